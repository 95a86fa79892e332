"""Where tensors lie in memory: read once at a save for all that asks, and compared with where they lay at the save
before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Places:
    """Holds where each of some tensors lies: the address of its first byte, how many items it has and of how many
    bytes, whether it is contiguous, and where they are not, shapes and strides. Two are equal where all tensors lie
    alike. No tensor is kept."""

    addresses: list[int]
    counts: list[int]
    items: list[int]
    contiguous: list[bool]
    strided: list[tuple[int, Any, Any]]


def places_of(tensors: Sequence[torch.Tensor]) -> Places:
    """Read where these tensors lie. For the training thread: it takes less than a microsecond a tensor."""
    # one list after the other: nothing is faster, neither tuples of all nor operator.attrgetter
    contiguous = [one.is_contiguous() for one in tensors]
    others = [] if all(contiguous) else [index for index, whole in enumerate(contiguous) if not whole]
    return Places(
        [one.data_ptr() for one in tensors],
        [one.numel() for one in tensors],
        [one.element_size() for one in tensors],
        contiguous,
        [(index, tensors[index].shape, tensors[index].stride()) for index in others],
    )


def cuda_devices(tensors: Sequence[torch.Tensor]) -> set[torch.device]:
    """Return the CUDA devices that these tensors lie on."""
    return {one.device for one in tensors if one.is_cuda}
