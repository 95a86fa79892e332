"""Some subclasses of ``torch.Tensor`` have no bytes of their own: they wrap other tensors, or compute their values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from asyncckpt.jsontree.wrapper_tensors import is_wrapper, parts_of
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor

PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})


def plain_parts(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors with those in the place of a wrapper that are inside it. Costs one look at the type of each
    tensor, as this runs on the training thread."""
    found: list[torch.Tensor] = []
    for tensor in tensors:
        if type(tensor) not in PLAIN_TYPES and is_wrapper(tensor):
            found += parts_of(tensor)
        else:
            found.append(tensor)
    return found


def hides_values(tensor: Any) -> bool:
    """Return whether a tensor's class, or that of a DTensor's local part, computes or hides its values: then it has no
    bytes that could be copied from or to."""
    if type(tensor) in PLAIN_TYPES:
        return False
    if is_distributed(tensor):
        # what stands for a collective that is under way becomes a plain tensor by waiting for it
        return not hasattr(tensor._local_tensor, "wait") and hides_values(tensor._local_tensor)
    if is_sharded_tensor(tensor):
        return False
    return getattr(type(tensor), "__torch_dispatch__", None) is not torch.Tensor.__torch_dispatch__
