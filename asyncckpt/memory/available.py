"""This module asks the system how much memory the process may still take.

A process's limit is the lowest on the way from its own control group (cgroup) up to the root: a job scheduler such as
Slurm limits the job, three groups above the task. Both versions of cgroups are read, from where they usually lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from asyncckpt.memory.buffers import padded

_UNKNOWN = 1 << 62
_V2 = ("/sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = ("/sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available_memory_bytes() -> int:
    """Return how many bytes of memory this process could take now, within the limits of its control groups. Returns
    2**62 where nothing is known. Reads a dozen small files of the kernel: some 100 µs."""
    available = _UNKNOWN
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for line in _lines("/proc/self/cgroup") or ["0::/"]:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            available = min(available, _available_below(path, *_V2))
        elif "memory" in controllers.split(","):
            available = min(available, _available_below(path, *_V1))
    return available


def processes_of_job_here() -> int:
    """Return how many processes the launcher has started on this host, this one included, as far as it says so."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1


def default_budget(extent_bytes: Sequence[int], sharing: int = 1) -> int:
    """Return the budget, in bytes, for a state whose extents have these sizes: all of them, but at most a quarter of
    the memory that is free now, which ``sharing`` processes of a job divide, and at least four times the largest, so
    that one extent is staged while others are written."""
    needed = sum(padded(nbytes) for nbytes in extent_bytes)
    sharing = max(sharing, processes_of_job_here())
    return min(needed, max(available_memory_bytes() // 4 // sharing, 4 * max(extent_bytes, default=0)))


def _available_below(path: str, mount: str, limits: tuple[str, ...], usage: str, reclaimable: str) -> int:
    """Return what the group at ``path`` and all above it leave. Inside a container the mount shows its own group as the
    root, and ``path`` may not be found below it: then the root's limit counts."""
    found = _UNKNOWN
    for group in _upwards(mount, path):
        limit = min((_number(f"{group}/{name}") for name in limits), default=_UNKNOWN)
        if limit < _UNKNOWN:
            # file pages that nobody uses count as used, and are given back as soon as memory is asked for
            cached = [int(line.split()[1]) for line in _lines(f"{group}/memory.stat") if line.split()[0] == reclaimable]
            used = _number(f"{group}/{usage}", 0) - sum(cached)
            found = min(found, max(0, limit - max(0, used)))
    return found


def _upwards(mount: str, path: str) -> Iterator[str]:
    parts = [part for part in path.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        yield "/".join([mount, *parts[:count]])


def _number(file: str, unknown: int = _UNKNOWN) -> int:
    """Return the number in a file: ``unknown`` where there is none, where it says ``max``, or, as v1 writes "no limit",
    where it is out of all proportion."""
    try:
        return min(int(_lines(file)[0]), _UNKNOWN)
    except (IndexError, ValueError):
        return unknown


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except (OSError, ValueError):
        return []
