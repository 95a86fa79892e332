"""What a checkpoint was made with, recorded for later questions of compatibility; and how much memory there is."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import socket
from pathlib import Path

import numpy as np
import torch

from asyncckpt.types import JsonValue


@functools.cache
def version() -> str:
    """This library's version."""
    try:
        return importlib.metadata.version("asyncckpt")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


@functools.cache
def record() -> dict[str, JsonValue]:
    """Python, torch, CUDA, NumPy, asyncckpt, host and platform. Read once: none of it changes in a process."""
    return {
        "asyncckpt": version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda) if torch.version.cuda else None,
        "numpy": np.__version__,
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }


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
