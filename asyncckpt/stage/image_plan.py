"""The plan of a snapshot on a device: where each extent lies in one piece of the device's memory, which so becomes the
image of all files that a save writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asyncckpt.memory.buffers import padded
from asyncckpt.stage.units import Unit, append_joined, follows
from asyncckpt.types import FRAME_HEADER_BYTES, Extent, Layout, Segment


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """Says what lies where in the image of a layout. ``places``: of each extent, where its bytes begin. ``segments``:
    the tensors' bytes, with places in the image; those of a tensor that lie side by side are one segment. ``headers``:
    what the formats put between, by place. Whatever else there is in the ``nbytes`` of the image are zeros."""

    places: tuple[int, ...]
    segments: tuple[Segment, ...]
    headers: tuple[tuple[int, bytes], ...]
    nbytes: int

    def ranges(self, unit: Unit, most_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield what a unit needs of the image, ``most_bytes`` at a time: where it lies in the image and in the unit's
        slot, and how many bytes it is. The header of a chunk's frame is left to the host."""
        first = unit.extents[0]
        skipped = FRAME_HEADER_BYTES if first.item_bytes else 0
        place, begin = self.places[unit.first] + skipped, first.block_offset + skipped
        nbytes = unit.nbytes - skipped
        for at in range(0, nbytes, most_bytes):
            yield place + at, begin + at, min(most_bytes, nbytes - at)


def image_plan(layout: Layout) -> ImagePlan:
    """Return the plan for this layout, which keeps it. Extents that continue each other in a file do so in the image;
    any other begins where O_DIRECT would have it begin in memory of its own."""
    found: ImagePlan | None = layout.cache.get("image")
    if found is None:
        found = layout.cache["image"] = _plan(layout.extents())
    return found


def _plan(extents: Sequence[Extent]) -> ImagePlan:
    places: list[int] = []
    segments: list[Segment] = []
    headers: list[tuple[int, bytes]] = []
    end = 0
    before: Extent | None = None
    for extent in extents:
        place = end if before is not None and follows(before, extent) else padded(end) + extent.block_offset
        places.append(place)
        if extent.header:
            headers.append((place, extent.header))
        for segment in extent.segments:
            at = place - extent.block_offset + segment.extent_offset
            append_joined(segments, Segment(segment.piece, segment.source_offset, at, segment.nbytes))
        end, before = place + extent.nbytes, extent
    return ImagePlan(tuple(places), tuple(segments), tuple(headers), padded(end))
