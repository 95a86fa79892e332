"""What a checkpoint was made with, recorded for later questions of compatibility; and how much memory there is."""

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
    """This library's version."""
    try:
        return importlib.metadata.version("asyncckpt")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


@functools.cache
def record() -> dict[str, JsonValue]:
    """Python, torch, CUDA, NumPy, asyncckpt, host and platform. Read once, by whoever has tensors to save, and so
    has torch: none of it changes in a process."""
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
