"""What lies in a staging slot: an extent's bytes, or a chunk as the frame that it would be if stored as it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES, SPLIT_MARK, Array, split_frame, split_places, stored_frame
from asyncckpt.manifest.records import DIGEST_SEPARATOR
from asyncckpt.memory.arena import Slot
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import Digest
from asyncckpt.types import LEAD_BYTES, Extent


def slot_bytes(extent: Extent) -> int:
    """What an extent needs of the arena: its staged bytes, or its frame, if that is larger."""
    return extent.nbytes + FRAME_OVERHEAD_BYTES if extent.item_bytes else extent.lead + extent.nbytes


def image_bytes(extent: Extent, slot: Slot) -> int:
    """The size of what is staged of a chunk, header included: a frame that holds it as it is."""
    if not slot.split:
        return extent.nbytes
    nbytes = extent.nbytes - LEAD_BYTES
    return split_places(nbytes, extent.item_bytes)[-1] + nbytes // extent.item_bytes


def finish_image(extent: Extent, slot: Slot) -> None:
    """Make of a staged chunk, with what lies before and after it, the frame that it would be if stored as it is."""
    if extent.item_bytes:
        image: Array = np.frombuffer(slot.view, np.uint8)
        nbytes = extent.nbytes - LEAD_BYTES
        make = split_frame if slot.split else stored_frame
        stored = make(image, nbytes, extent.item_bytes)
        image[stored : padded(stored)] = 0


def content_digest(digest: Digest, extent: Extent, slot: Slot) -> str:
    """The digest of what is staged. A chunk stored as it is has just these bytes in its file; an extent with cuts has
    several, one after the other."""
    if not extent.item_bytes:
        return cut_digest(digest, slot.view[extent.lead : extent.lead + extent.nbytes], extent.cuts)
    found = digest(slot.view[: padded(image_bytes(extent, slot))])
    return f"{SPLIT_MARK}{found}" if slot.split else found


def cut_digest(digest: Digest, view: memoryview, cuts: Sequence[int]) -> str:
    """The digests of the parts of ``view``, joined; see ``records.split_record``."""
    if not cuts:
        return digest(view)
    edges = (0, *cuts, len(view))
    return DIGEST_SEPARATOR.join(digest(view[begin:end]) for begin, end in itertools.pairwise(edges))


@dataclass(slots=True)
class Frame:
    """An encoded chunk: the first ``stored`` bytes of ``view``, which is zeros up to a multiple of 4096 and lies in the
    staging slot or in a buffer of the encoder's. ``unchanged``: it is the staged image."""

    view: memoryview
    stored: int
    buffer: memoryview | None
    unchanged: bool = False


def as_it_is(extent: Extent, slot: Slot) -> Frame:
    """A staged chunk as a frame, without a codec: where it lies."""
    return Frame(slot.view, image_bytes(extent, slot), None, unchanged=True)
