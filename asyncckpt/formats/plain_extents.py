"""A plain shard is one line of bytes, which is cut into extents: all of it, or the spans that one rank writes."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from asyncckpt.formats import read_boundaries
from asyncckpt.types import ALIGNMENT_BYTES, Extent, Segment, TensorRange


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor in the line of bytes. ``piece``: the index of what is copied there, which has the tensor's bytes from
    ``begin`` on."""

    placement: TensorRange
    piece: int
    begin: int = 0


def extents_of(
    number: int,
    spans: Sequence[tuple[int, int]],
    header: bytes,
    lying: Sequence[PlacedTensor],
    extent_bytes: int,
) -> Iterator[Extent]:
    """Cut spans of shard ``number``, which begins with ``header``, into extents where the undivided file is cut too, so
    that none is larger than its extents. ``lying``: the tensors that have bytes, in order. Pure."""
    ends = [item.placement.end for item in lying]
    for low, high in spans:
        begin = low
        while begin < high:
            end = min(high, (begin // extent_bytes + 1) * extent_bytes)
            block_offset = begin % ALIGNMENT_BYTES
            segments: list[Segment] = []
            cuts: set[int] = set()
            at = bisect.bisect_right(ends, begin)
            while at < len(lying) and lying[at].placement.begin < end:
                item = lying[at]
                place = item.placement
                start, stop = max(begin, place.begin), min(end, place.end)
                source = start - place.begin - item.begin
                segments.append(Segment(item.piece, source, block_offset + start - begin, stop - start))
                offsets = (place.begin + cut for cut in read_boundaries.boundaries(place.spec))
                cuts.update(offset - begin for offset in offsets if begin < offset < end)
                at += 1
            yield Extent(
                number,
                begin,
                end - begin,
                header[begin:end],
                tuple(segments),
                block_offset=block_offset,
                digest_boundaries=tuple(sorted(cuts)),
            )
            begin = end


class PlainExtents(Sequence[Extent]):
    """Has the extents of a whole plain shard. They are made when one is asked for: where ranks divide a shard among
    themselves nobody asks, and a large job has millions. Thread-safe; equal to a tuple of the same extents."""

    def __init__(
        self, number: int, header: bytes, lying: Sequence[PlacedTensor], nbytes: int, extent_bytes: int
    ) -> None:
        self._count = -(-nbytes // extent_bytes)
        self._arguments = number, [(0, nbytes)], header, lying, extent_bytes
        self._made: tuple[Extent, ...] | None = None

    def _all(self) -> tuple[Extent, ...]:
        if self._made is None:
            number, spans, header, lying, extent_bytes = self._arguments
            held = [item for item in lying if item.placement.spec.nbytes]
            self._made = tuple(extents_of(number, spans, header, held, extent_bytes))
        return self._made

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Extent: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Extent]: ...

    def __getitem__(self, index: int | slice) -> Extent | Sequence[Extent]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PlainExtents):
            return self._arguments == other._arguments
        return isinstance(other, tuple) and self._all() == other

    def __hash__(self) -> int:
        return hash(self._all())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return tuple, (self._all(),)
