"""This module asks the system how much memory the process may still take."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes() -> int:
    """Return how many bytes of memory this process could take now, within the limit of its container (cgroup v2).
    Returns 2**62 where neither is known."""
    available = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # there is no cgroup v2 here, or no /proc: what is known so far has to do
    return available
