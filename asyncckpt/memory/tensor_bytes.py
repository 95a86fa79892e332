"""A tensor's bytes may lie in memory otherwise than they are stored: this module tells, and copies ranges of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_libc = ctypes.CDLL(None)  # CDLL releases the GIL during the copy; PyDLL would not
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p
#: Both copy ``(to, from, nbytes)``, by addresses: the first with the interpreter's lock released, the second holding
#: it, which is faster where many small pieces are copied beside other threads.
copy_memory = _libc.memcpy
copy_small = ctypes.PyDLL(None).memcpy
copy_small.argtypes = _libc.memcpy.argtypes
copy_small.restype = ctypes.c_void_p


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether the tensor's bytes lie in memory exactly as they are stored: row-major, without gaps, and neither
    conjugated nor negated lazily."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether a tensor of this shape with these strides, in elements, fills its memory without gap or overlap,
    in whatever order of its dimensions."""
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def may_overlap(tensor: torch.Tensor) -> bool:
    """Return whether several elements of the tensor may lie in one place of its memory, as those of an expanded tensor
    do. Such a tensor cannot be copied into."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _copy_strided(tensor: torch.Tensor, first: int, last: int, flat: torch.Tensor, *, out: bool = True) -> None:
    """Copy the row-major elements ``[first, last)`` of the tensor to ``flat``, or with ``out=False`` from ``flat`` into
    the tensor. It never makes a contiguous copy of the whole tensor, which would cost the tensor's memory."""
    if first >= last:
        return
    if first == 0 and last == tensor.numel():
        _move(tensor, flat.view(tensor.shape), out)
    elif tensor.dim() == 1:
        _move(tensor[first:last], flat, out)
    else:
        row = tensor.numel() // tensor.shape[0]
        position = first
        while position < last:
            index, within = divmod(position, row)
            if within == 0 and last - position >= row:  # all whole rows from here on are copied at once
                stop = last - last % row
                part = flat[position - first : stop - first].view(-1, *tensor.shape[1:])
                _move(tensor[index : stop // row], part, out)
            else:
                stop = min(last, (index + 1) * row)
                part = flat[position - first : stop - first]
                _copy_strided(tensor[index], within, stop - index * row, part, out=out)
            position = stop


def _move(tensor: torch.Tensor, flat: torch.Tensor, out: bool) -> None:
    if out:
        flat.copy_(tensor, non_blocking=True)
    else:
        tensor.copy_(flat)
