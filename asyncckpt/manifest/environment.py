"""A checkpoint records the versions and the host that it was made with, for later questions of compatibility."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import socket
from collections.abc import Mapping

import numpy as np

from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.types import JsonValue


@functools.cache
def version() -> str:
    """Return this library's version."""
    try:
        return importlib.metadata.version("asyncckpt")
    except importlib.metadata.PackageNotFoundError:  # it runs from a source tree
        return "0+unknown"


#: What decides whether training goes on with the same bits. Host, platform and Python do not.
_DECISIVE = ("asyncckpt", "torch", "cuda", "numpy")


def changes(recorded: Mapping[str, JsonValue], world_size: int, ranks: int) -> list[str]:
    """Say in words where the versions that a checkpoint recorded, and the number of ranks that wrote it, differ from
    today's ``ranks`` and versions. What was not recorded does not count."""
    now = record()
    told = [
        f"{name} {recorded[name] or 'none'} (now {now[name] or 'none'})"
        for name in _DECISIVE
        if name in recorded and recorded[name] != now[name]
    ]
    return told + ([f"{world_size} ranks (now {ranks})"] if world_size != ranks else [])


@functools.cache
def record() -> dict[str, JsonValue]:
    """Return the versions of asyncckpt, Python, torch, CUDA and NumPy, the host and the platform. They are read once,
    as none changes in a process. Torch must be imported, as it is where there are tensors to save."""
    torch = loaded_torch()
    return {
        "asyncckpt": version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda) if torch.version.cuda else None,
        "numpy": np.__version__,
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }
