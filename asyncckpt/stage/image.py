"""A staging slot holds an extent's bytes or a chunk's image: the frame that the chunk would be without compression."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES, Array, split_frame, split_places, uncompressed_frame
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import Digest
from asyncckpt.types import FRAME_HEADER_BYTES, ContentDigest, Extent, StagedDigests


def slot_bytes(extent: Extent) -> int:
    """Return how many bytes of the arena an extent needs: those of its frame if it is a chunk, else its own."""
    return extent.nbytes + FRAME_OVERHEAD_BYTES if extent.item_bytes else extent.block_offset + extent.nbytes


def image_bytes(extent: Extent, slot: StagingBuffer) -> int:
    """Return the bytes of a chunk's image, its header included."""
    if not slot.split:
        return extent.nbytes
    nbytes = extent.nbytes - FRAME_HEADER_BYTES
    return split_places(nbytes, extent.item_bytes)[-1] + nbytes // extent.item_bytes


def finish_image(extent: Extent, slot: StagingBuffer) -> None:
    """Write the frame header before a staged chunk, and what else a frame needs around it, so that the slot holds the
    frame of the chunk stored without compression. Does nothing to an extent that is no chunk."""
    if extent.item_bytes:
        image: Array = np.frombuffer(slot.view, np.uint8)
        nbytes = extent.nbytes - FRAME_HEADER_BYTES
        make = split_frame if slot.split else uncompressed_frame
        stored = make(image, nbytes, extent.item_bytes)
        image[stored : padded(stored)] = 0


def staged_digests(digest: Digest, extent: Extent, slot: StagingBuffer) -> StagedDigests:
    """Digest what is staged: a chunk's image, padding included, which is what its file holds if the chunk is stored as
    it is. Any other extent has a digest for each part between two cuts."""
    if not extent.item_bytes:
        return cut_digests(
            digest, slot.view[extent.block_offset : extent.block_offset + extent.nbytes], extent.digest_boundaries
        )
    return ContentDigest(digest(slot.view[: padded(image_bytes(extent, slot))]), slot.split)


def cut_digests(digest: Digest, view: memoryview, cuts: Sequence[int]) -> tuple[str, ...]:
    """Digest each part of ``view`` between two cuts."""
    if not cuts:
        return (digest(view),)
    edges = (0, *cuts, len(view))
    return tuple(digest(view[begin:end]) for begin, end in itertools.pairwise(edges))


@dataclass(slots=True)
class Frame:
    """An encoded chunk: the first ``payload_bytes`` of ``view``, followed by zeros up to a multiple of 4096.
    ``buffer``: the encoder's buffer that it lies in, None where it lies in the staging slot or in memory of its own.
    ``unchanged``: it is the staged image."""

    view: memoryview
    payload_bytes: int
    buffer: memoryview | None
    unchanged: bool = False


def as_it_is(extent: Extent, slot: StagingBuffer) -> Frame:
    """Return a staged chunk as the frame that its slot already holds: no codec, no copy."""
    return Frame(slot.view, image_bytes(extent, slot), None, unchanged=True)
