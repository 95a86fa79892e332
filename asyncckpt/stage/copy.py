"""Copies tensors' bytes into the arena: the only code that touches tensor memory on the way out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncckpt.codecs.blosc import split_places
from asyncckpt.codecs.codecs import MIN_PLANES_CHUNK_BYTES
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.tensor_bytes import _copy_strided, _libc, is_plain
from asyncckpt.types import FRAME_HEADER_BYTES, Extent, Segment

#: Smaller neighbours are copied in one call: a call that gives the GIL up may have to wait for it afterwards, and
#: twenty thousand such waits would cost more than the copies.
_BATCH_BELOW_BYTES = 256 << 10


def copy_segments(tensors: Sequence[torch.Tensor], segments: Sequence[Segment], slot: StagingBuffer) -> None:
    """Copy every segment to its place in the slot. CPU tensors: done on return; CUDA tensors: enqueued on the current
    stream. Blocks; releases the GIL while bytes move. The tensors must stay unchanged meanwhile."""
    batch: list[torch.Tensor] = []
    start = end = 0
    for segment in segments:
        tensor = tensors[segment.piece].detach()
        small = segment.nbytes < _BATCH_BELOW_BYTES
        if tensor.device.type == "cpu" and is_plain(tensor):
            if small:
                if batch and segment.extent_offset != end:
                    _flush(batch, slot, start, end)
                if not batch:
                    start = segment.extent_offset
                end = segment.extent_offset + segment.nbytes
                flat = _flat_bytes(tensor)
                batch.append(flat[segment.source_offset : segment.source_offset + segment.nbytes])
            else:
                source = tensor.data_ptr() + segment.source_offset
                _libc.memcpy(slot.address + segment.extent_offset, source, segment.nbytes)
        elif is_plain(tensor):
            flat = _flat_bytes(tensor)[segment.source_offset : segment.source_offset + segment.nbytes]
            target = slot.tensor[segment.extent_offset : segment.extent_offset + segment.nbytes]
            target.copy_(flat, non_blocking=True)
        else:
            item = tensor.element_size()
            target = slot.tensor[segment.extent_offset : segment.extent_offset + segment.nbytes]
            first = segment.source_offset // item
            _copy_strided(tensor, first, first + segment.nbytes // item, target.view(tensor.dtype))
    _flush(batch, slot, start, end)


def host_writes(tensors: Sequence[torch.Tensor], extent: Extent) -> bool:
    """Whether the host itself writes into the slot while this extent is staged: a header, padding, or CPU tensors."""
    if extent.header or extent.item_bytes or not extent.segments:
        return True
    last = extent.segments[-1]
    ends_short = last.extent_offset + last.nbytes < extent.block_offset + extent.nbytes
    return ends_short or any(tensors[segment.piece].device.type == "cpu" for segment in extent.segments)


def can_split(tensors: Sequence[torch.Tensor], extent: Extent) -> bool:
    """Whether a chunk can be split into byte planes on its tensor's device."""
    nbytes = extent.nbytes - FRAME_HEADER_BYTES
    if extent.item_bytes < 2 or nbytes < MIN_PLANES_CHUNK_BYTES or nbytes % extent.item_bytes:
        return False
    if len(extent.segments) != 1:
        return False
    return is_plain(tensors[extent.segments[0].piece])


def copy_planes(tensors: Sequence[torch.Tensor], extent: Extent, slot: StagingBuffer) -> None:
    """Split a chunk into its byte planes on its device, and copy each to its place in the frame; see
    ``copy_segments``."""
    segment, item = extent.segments[0], extent.item_bytes
    flat = _flat_bytes(tensors[segment.piece].detach())
    planes = flat[segment.source_offset : segment.source_offset + segment.nbytes].view(-1, item).t().contiguous()
    nbytes = extent.nbytes - FRAME_HEADER_BYTES
    for plane, place in zip(planes, split_places(nbytes, item), strict=True):
        slot.tensor[place : place + len(plane)].copy_(plane, non_blocking=True)
        slot.tensor[place + len(plane) : place + nbytes // item].zero_()  # an array's edge


def fill_rest(slot: StagingBuffer, extent: Extent) -> None:
    """Write zeros after an extent's last segment, which pad a chunk at an array's edge. Done on return."""
    if extent.segments:
        last = extent.segments[-1]
        end = last.extent_offset + last.nbytes
        stop = extent.block_offset + extent.nbytes
        if end < stop:
            slot.tensor[end:stop].zero_()


def write_header(slot: StagingBuffer, header: bytes) -> None:
    """Put the format's leading bytes at the slot's beginning."""
    slot.view[: len(header)] = header


def _flush(batch: list[torch.Tensor], slot: StagingBuffer, start: int, end: int) -> None:
    if batch:
        torch.cat(batch, out=slot.tensor[start:end])
        batch.clear()


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
