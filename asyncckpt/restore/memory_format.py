"""The memory format of a live tensor, such as ``channels_last``, is part of what is restored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from asyncckpt.memory.tensor_bytes import is_dense
from asyncckpt.state.dtensor import is_distributed


def format_to_be(live: torch.Tensor, saved: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the strides that a live tensor of a module has after it was restored. ``saved``: those that were stored,
    or None where the module is not restored or they are not known.

    A tensor that is row-major, as every new one is, takes the format that was saved. One that has another format
    already was given it on purpose, and a tensor that shares its memory with anything larger is a view: both keep
    theirs.
    """
    mine = live.stride()
    if saved is None or is_distributed(live):
        return mine
    if live.is_meta:
        return saved
    whole = live.untyped_storage().nbytes() == live.numel() * live.element_size()
    takes = live.is_contiguous() and whole and len(saved) == live.dim() and is_dense(tuple(live.shape), saved)
    return saved if takes else mine


def take_format(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give tensors of a module new memory, in the memory format and with the values of ``values``, by ``state_dict``
    key. The objects stay, as with ``module.to(memory_format=...)``, and so do ties."""
    there = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    moved = {there[raw].data_ptr(): value for raw, value in values.items()}
    for tensor in there.values():
        value = moved.get(tensor.data_ptr()) if tensor.numel() and not is_distributed(tensor) else None
        if value is not None and tensor.shape == value.shape:
            tensor.data = value
