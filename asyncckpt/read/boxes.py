"""A box is the part of a tensor that is one range in each dimension; this module cuts runs of bytes into boxes.

Stored bytes come as runs: a contiguous part of a tensor's, or of a box's, row-major elements. Such a run is cut into
boxes, and each box is copied into the part that it shares with a box of live memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.read.scatter import Window, on_device_of

if TYPE_CHECKING:
    import torch

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TargetBox:
    """A live tensor takes the box of a stored one that begins at ``offsets`` and has the live tensor's shape."""

    tensor: torch.Tensor
    offsets: Index


Target = Window | TargetBox


class SourceBox(NamedTuple):
    """A box was cut out of a run of elements, in which its own first element has the position ``first``."""

    offsets: Index
    shape: Index
    first: int


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[SourceBox]:
    """Cut the elements ``[begin, end)`` of a tensor of this shape, in row-major order, into at most ``2 * dims - 1``
    boxes. Pure."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield SourceBox((begin,) if shape else (), (end - begin,) if shape else (), 0)
        return
    inner = tuple(shape[1:])
    row = math.prod(inner)
    (first, head), (last, tail) = divmod(begin, row), divmod(end, row)
    if first == last:
        yield from _boxes_in_row(inner, first, head, tail, 0)
        return
    if head:
        yield from _boxes_in_row(inner, first, head, row, 0)
        first += 1
    if first < last:
        yield SourceBox((first, *(0 for _ in inner)), (last - first, *inner), first * row - begin)
    if tail:
        yield from _boxes_in_row(inner, last, 0, tail, last * row - begin)


def _boxes_in_row(inner: Index, index: int, begin: int, end: int, first: int) -> Iterator[SourceBox]:
    for box in flat_boxes(inner, begin, end):
        yield SourceBox((index, *box.offsets), (1, *box.shape), first + box.first)


def target_boxes(target: Target, shape: Sequence[int]) -> list[TargetBox]:
    """Return the boxes of live memory that together are ``target``, which takes a part of a tensor of this shape."""
    if isinstance(target, TargetBox):
        return [target]
    live = target.tensor.detach()
    row = math.prod(shape[1:])
    if len(shape) == live.dim() and tuple(live.shape[1:]) == tuple(shape[1:]) and (not row or target.first % row == 0):
        offsets = (target.first // row if row else 0, *(0 for _ in shape[1:])) if shape else ()
        return [TargetBox(live, offsets)]
    flat = live.view(-1)
    return [
        TargetBox(flat[box.first : box.first + math.prod(box.shape)].view(box.shape), box.offsets)
        for box in flat_boxes(shape, target.first, target.first + flat.numel())
    ]


def overlap(offsets: Sequence[int], shape: Sequence[int], target: TargetBox) -> list[tuple[int, int]] | None:
    """Return ``(begin, end)`` in each dimension of what a box and a target share; None where they share nothing."""
    common = [
        (max(mine, theirs), min(mine + size, theirs + other))
        for mine, size, theirs, other in zip(offsets, shape, target.offsets, target.tensor.shape, strict=True)
    ]
    return None if any(begin >= end for begin, end in common) else common


def overlap_range(offsets: Sequence[int], shape: Sequence[int], target: TargetBox) -> tuple[int, int]:
    """Return the range of the box's elements, in row-major order, from the first to the last that the target takes;
    ``(0, 0)`` where it takes none."""
    common = overlap(offsets, shape, target)
    if common is None:
        return 0, 0
    first = last = 0
    for (begin, end), offset, size in zip(common, offsets, shape, strict=True):
        first, last = first * size + begin - offset, last * size + end - 1 - offset
    return first, last + 1


def scatter_box(
    target: TargetBox, offsets: Sequence[int], shape: Sequence[int], first: int, data: torch.Tensor, dtype: torch.dtype
) -> None:
    """Copy bytes of a box into the target, converted from ``dtype`` and moved to its device.

    ``offsets`` and ``shape`` are the box's; ``data`` (uint8, on the CPU) begins at its element ``first``. Blocks.
    Threads may work on different parts of one target. Raises ``CheckpointDamaged`` where the bytes end within an
    element."""
    if data.numel() % dtype.itemsize:
        raise CheckpointDamaged("an extent ends in the middle of an element")
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    values = data.view(dtype)
    for box in flat_boxes(shape, first, first + values.numel()):
        begins = tuple(outer + inner for outer, inner in zip(offsets, box.offsets, strict=True))
        common = overlap(begins, box.shape, target)
        if common is None:
            continue
        source = values[box.first : box.first + math.prod(box.shape)].view(box.shape)
        taken = tuple(slice(begin - at, end - at) for (begin, end), at in zip(common, begins, strict=True))
        filled = tuple(slice(begin - at, end - at) for (begin, end), at in zip(common, target.offsets, strict=True))
        with on_device_of(target.tensor):
            target.tensor.detach()[filled].copy_(source[taken])
