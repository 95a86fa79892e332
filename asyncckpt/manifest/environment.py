"""A checkpoint records the versions and the host that it was made with, for later questions of compatibility."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import socket

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
