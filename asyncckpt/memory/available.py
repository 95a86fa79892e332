"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes() -> int:
    """Memory that could be taken now, the container's limit counted in."""
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
        pass  # no cgroup v2 here, or no /proc: the first answer stands
    return available
