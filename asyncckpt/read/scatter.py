"""Copies stored bytes into live tensors: no other code touches tensor memory on the way back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncckpt.memory import cuda
from asyncckpt.memory.tensor_bytes import _copy_strided, _libc, is_plain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Window:
    """A live tensor takes a part of a stored one: its elements from ``first`` on, in row-major order."""

    tensor: torch.Tensor
    first: int = 0


def scatter(target: torch.Tensor, first_byte: int, data: torch.Tensor, dtype: torch.dtype) -> None:
    """Copy bytes of a stored tensor into ``target``, converted from ``dtype`` and moved to its device.

    ``data`` (uint8, on the CPU) begins ``first_byte`` bytes after the byte that the target's first element has. Blocks,
    with the GIL released. Threads may work on different ranges of one target."""
    target = target.detach()
    if target.dtype == dtype and target.device.type == "cpu" and is_plain(target):
        _libc.memcpy(target.data_ptr() + first_byte, data.data_ptr(), data.numel())
        return
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    values = data.view(dtype)
    first = first_byte // dtype.itemsize
    with on_device_of(target):
        _copy_strided(target, first, first + values.numel(), values, out=False)


def on_device_of(target: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Return what to be in while this thread copies into a live tensor: a reader's thread has no device yet."""
    return cuda.on(target.device) if target.is_cuda else contextlib.nullcontext()
