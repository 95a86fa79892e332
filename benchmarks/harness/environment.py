"""Figures carry a description of what they were measured on: enough to compare them, and nothing that names the
machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

PACKAGES = ("asyncckpt", "torch", "safetensors", "torch-checkpointing", "numpy", "xxhash")


def describe(directory: str) -> dict[str, str | int]:
    """Describe CPU, cores, memory, kernel, the file system type of ``directory``, and versions."""
    described: dict[str, str | int] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            described[package] = "not installed"
    return described


def sentence(described: dict[str, str | int]) -> str:
    """Format the description as one line, which goes under a table."""
    gib = int(described["memory_bytes"]) / (1 << 30)
    return (
        f"{described['date']}, {described['cpu']}, {described['cores']} cores, {gib:.0f} GiB, "
        f"{described['filesystem']}, Linux {described['kernel']}, Python {described['python']}, "
        f"torch {described['torch']}"
    )


def filesystem(directory: str) -> str:
    """Return the type of the file system that holds ``directory``."""
    path = os.path.realpath(directory)
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        mount = mount.encode().decode("unicode_escape")
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
