"""Calls of CUDA that this library makes, on whatever thread, name their device and leave a capture of the trainer's
alone.

A thread begins on device 0, so that its first call would make a context there: half a gigabyte on another rank's GPU.
And while a thread captures a CUDA graph, a harmless question on another one (has this event happened?) is an error on
both, unless that other one says before that it knows what it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from asyncckpt.loaded_torch import loaded_torch

if TYPE_CHECKING:
    import torch

#: The mode of a thread in which it may call what does not belong to a capture (``CU_STREAM_CAPTURE_MODE_RELAXED``).
_RELAXED = 2
#: Puts a thread into the mode that it is given, and leaves there the mode that the thread had. Returns 0 if it did.
Exchange = Callable[["ctypes.c_int"], int]


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make the calls of CUDA in the body with ``device`` as this thread's, and beside captures. No context is made on
    another device, before or after. Costs microseconds. For a CUDA device alone."""
    with loaded_torch().cuda.device(device), beside_captures():
        yield


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Let the calls of CUDA in the body neither break a graph that a thread captures nor fail because of it. They must
    not work on a capturing stream. Does nothing in a process that has not used CUDA.

    Raises ``RuntimeError`` where this thread captures, and nothing can be called beside that (a driver without it)."""
    torch = loaded_torch()
    if torch is None or not torch.cuda.is_initialized():
        yield
        return
    exchange = exchange_of_driver()
    mode = ctypes.c_int(_RELAXED)
    exchanged = exchange is not None and exchange(mode) == 0
    if not exchanged and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("nothing can be asked of the device while this thread captures a CUDA graph")
    try:
        yield
    finally:
        if exchanged and exchange is not None:
            exchange(mode)


@functools.cache
def exchange_of_driver() -> Exchange | None:
    """Return the driver's function that exchanges the calling thread's mode; None where there is none, as with AMD's.
    Makes no context."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.POINTER(ctypes.c_int)], ctypes.c_int

    def exchange(mode: ctypes.c_int) -> int:
        return int(function(ctypes.byref(mode)))

    return exchange


def is_capturing() -> bool:
    """Whether a CUDA graph is captured on this thread's current stream. Never blocks, and makes no CUDA context."""
    torch = loaded_torch()
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
