"""A unit is what staging, hand-over and writing do at once: consecutive extents of one file, side by side in one slot.

Each extent keeps a digest of its own, so the format knows nothing of units (docs/design/023-units.md).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.buffers import padded
from asyncckpt.stage.image import slot_bytes
from asyncckpt.types import ALIGNMENT_BYTES, Extent, Segment

#: A larger unit would not be written faster, and training would wait longer for its copy to end.
_MOST_BYTES = 64 << 20
#: The arena holds so many units at least: some are written while others are staged.
_IN_ARENA = 8


@dataclass(frozen=True, slots=True)
class Unit:
    """Extents from index ``first`` of the layout on. ``places`` says where each of them begins in the slot: there, a
    slot of its own would lie as well. ``segments`` have offsets in the slot, and ``gaps`` are the ranges of the slot
    that are filled with zeros."""

    first: int
    extents: tuple[Extent, ...]
    places: tuple[int, ...]
    segments: tuple[Segment, ...]
    gaps: tuple[tuple[int, int], ...]

    @property
    def shard(self) -> int:
        """The index of the shard that the extents belong to."""
        return self.extents[0].shard

    @property
    def nbytes(self) -> int:
        """How many bytes of the file the extents are."""
        return sum(extent.nbytes for extent in self.extents)

    def parts(self, slot: StagingBuffer) -> Iterator[tuple[int, Extent, StagingBuffer]]:
        """Yield each extent with its index in the layout and the part of ``slot`` that is its own slot."""
        if len(self.extents) == 1:
            yield self.first, self.extents[0], slot
            return
        for number, (extent, place) in enumerate(zip(self.extents, self.places, strict=True), self.first):
            yield number, extent, slot.part(place, min(padded(slot_bytes(extent)), slot.nbytes - place))


def unit_bytes(budget_bytes: int) -> int:
    """Return how large a unit may be in an arena of ``budget_bytes``. One extent is a unit however large it is."""
    return min(_MOST_BYTES, budget_bytes // _IN_ARENA)


def follows(before: Extent, after: Extent) -> bool:
    """Whether an extent may lie in one unit with the one before it: it continues the same file. A chunk for a codec is
    always a unit of its own, because encoding changes its size."""
    return (
        before.offset + before.nbytes == after.offset
        and before.shard == after.shard
        and not (before.item_bytes or after.item_bytes or before.payload_bytes or after.payload_bytes)
        and (before.block_offset + before.nbytes - after.block_offset) % ALIGNMENT_BYTES == 0
    )


def places_in_slot(extents: Sequence[Extent]) -> list[int]:
    """Return where each of some consecutive extents begins in the slot of their unit."""
    base = extents[0].block_offset - extents[0].offset
    return [base + extent.offset - extent.block_offset for extent in extents]


class Units:
    """Makes units of a layout's extents, and keeps them in ``kept``, which lives as long as the layout: a save has much
    the same units as the one before. Thread-safe."""

    def __init__(self, extents: Sequence[Extent], kept: MutableMapping[tuple[int, int], Unit]) -> None:
        self._extents = extents
        self._kept = kept

    def of(self, first: int, count: int) -> Unit:
        """Return the unit of ``count`` extents from index ``first`` on."""
        unit = self._kept.get((first, count))
        if unit is None:
            if len(self._kept) > 2 * len(self._extents):
                self._kept.clear()  # units of all sizes: memory is short, and no save is like another
            unit = self._kept[first, count] = _unit(first, self._extents[first : first + count])
        return unit


def _unit(first: int, extents: Sequence[Extent]) -> Unit:
    places = places_in_slot(extents)
    if len(extents) == 1:
        segments = list(extents[0].segments)
    else:
        segments = []
        for extent, place in zip(extents, places, strict=True):
            for one in extent.segments:
                append_joined(segments, Segment(one.piece, one.source_offset, place + one.extent_offset, one.nbytes))
    gaps = tuple(gap for extent, place in zip(extents, places, strict=True) for gap in _gaps(extent, place))
    return Unit(first, tuple(extents), tuple(places), tuple(segments), gaps)


def append_joined(segments: list[Segment], new: Segment) -> None:
    """Append a segment, or make the last one longer where the new one continues it."""
    last = segments[-1] if segments else None
    if (
        last is not None
        and last.piece == new.piece
        and last.source_offset + last.nbytes == new.source_offset
        and last.extent_offset + last.nbytes == new.extent_offset
    ):
        segments[-1] = Segment(last.piece, last.source_offset, last.extent_offset, last.nbytes + new.nbytes)
    else:
        segments.append(new)


def _gaps(extent: Extent, place: int) -> Iterator[tuple[int, int]]:
    """Yield what has to be zero after an extent's last segment, which pads a chunk at an array's edge."""
    if extent.segments:
        last = extent.segments[-1]
        end, stop = last.extent_offset + last.nbytes, extent.block_offset + extent.nbytes
        if end < stop:
            yield place + end, place + stop


def neighbours(positions: Sequence[int]) -> list[list[int]]:
    """Return the positions, in ascending order, in runs without a gap."""
    runs: list[list[int]] = []
    for at in sorted(positions):
        if runs and runs[-1][-1] + 1 == at:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs
