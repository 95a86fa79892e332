"""Boxes: parts of a tensor that are ranges in every dimension; how a run of a box's bytes gives to parts of others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.read.scatter import Window

if TYPE_CHECKING:
    import torch

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A live tensor that takes the box of a stored one that begins at ``offsets`` and has the live one's shape."""

    tensor: torch.Tensor
    offsets: Index


Target = Window | Region


class Place(NamedTuple):
    """A box and where its first element lies in the run of elements it was cut out of."""

    offsets: Index
    shape: Index
    first: int


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Place]:
    """The elements ``[begin, end)`` of a tensor of this shape, in row-major order, as at most ``2 * dims - 1`` boxes.
    Pure."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield Place((begin,) if shape else (), (end - begin,) if shape else (), 0)
        return
    inner = tuple(shape[1:])
    row = math.prod(inner)
    (first, head), (last, tail) = divmod(begin, row), divmod(end, row)
    if first == last:
        yield from _in_row(inner, first, head, tail, 0)
        return
    if head:
        yield from _in_row(inner, first, head, row, 0)
        first += 1
    if first < last:
        yield Place((first, *(0 for _ in inner)), (last - first, *inner), first * row - begin)
    if tail:
        yield from _in_row(inner, last, 0, tail, last * row - begin)


def _in_row(inner: Index, index: int, begin: int, end: int, first: int) -> Iterator[Place]:
    for place in flat_boxes(inner, begin, end):
        yield Place((index, *place.offsets), (1, *place.shape), first + place.first)


def regions(target: Target, shape: Sequence[int]) -> list[Region]:
    """A target that takes a part of a tensor of this shape, as boxes of live memory."""
    if isinstance(target, Region):
        return [target]
    live = target.tensor.detach()
    row = math.prod(shape[1:])
    if len(shape) == live.dim() and tuple(live.shape[1:]) == tuple(shape[1:]) and (not row or target.first % row == 0):
        offsets = (target.first // row if row else 0, *(0 for _ in shape[1:])) if shape else ()
        return [Region(live, offsets)]
    flat = live.view(-1)
    return [
        Region(flat[place.first : place.first + math.prod(place.shape)].view(place.shape), place.offsets)
        for place in flat_boxes(shape, target.first, target.first + flat.numel())
    ]


def overlap(offsets: Sequence[int], shape: Sequence[int], region: Region) -> list[tuple[int, int]] | None:
    """``(begin, end)`` in every dimension of what a box and a region share; None where that is nothing."""
    common = [
        (max(mine, theirs), min(mine + size, theirs + other))
        for mine, size, theirs, other in zip(offsets, shape, region.offsets, region.tensor.shape, strict=True)
    ]
    return None if any(begin >= end for begin, end in common) else common


def span(offsets: Sequence[int], shape: Sequence[int], region: Region) -> tuple[int, int]:
    """The elements of the box, in row-major order, from the first to the last that the region takes; ``(0, 0)`` where
    it takes none."""
    common = overlap(offsets, shape, region)
    if common is None:
        return 0, 0
    first = last = 0
    for (begin, end), offset, size in zip(common, offsets, shape, strict=True):
        first, last = first * size + begin - offset, last * size + end - 1 - offset
    return first, last + 1


def scatter_box(
    region: Region, offsets: Sequence[int], shape: Sequence[int], first: int, data: torch.Tensor, dtype: torch.dtype
) -> None:
    """Put bytes (``data``, uint8 on the CPU) that begin at element ``first`` of a box into the region, converting from
    ``dtype`` and moving to its device. Blocks; threads may work on different parts of one region. Raises
    ``CheckpointDamaged`` where the bytes are no whole elements."""
    if data.numel() % dtype.itemsize:
        raise CheckpointDamaged("an extent ends in the middle of an element")
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    values = data.view(dtype)
    for place in flat_boxes(shape, first, first + values.numel()):
        where = tuple(outer + inner for outer, inner in zip(offsets, place.offsets, strict=True))
        common = overlap(where, place.shape, region)
        if common is None:
            continue
        source = values[place.first : place.first + math.prod(place.shape)].view(place.shape)
        taken = tuple(slice(begin - at, end - at) for (begin, end), at in zip(common, where, strict=True))
        given = tuple(slice(begin - at, end - at) for (begin, end), at in zip(common, region.offsets, strict=True))
        region.tensor.detach()[given].copy_(source[taken])
