"""Copies tensors' bytes into the arena: the only code that touches tensor memory on the way out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._utils import _unflatten_dense_tensors

from asyncckpt.codecs.blosc import split_places
from asyncckpt.codecs.codecs import MIN_PLANES_CHUNK_BYTES
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.tensor_bytes import _copy_strided, is_plain
from asyncckpt.types import FRAME_HEADER_BYTES, Extent, Segment

#: A tensor is copied in pieces of so many elements: from 32,768 on, torch would start threads of its own for each copy.
_SERIAL_ELEMENTS = 7 << 12
#: So many pieces go into one call. More objects at a time would have Python's collector run.
_AT_ONCE = 512
#: Large tensors are copied as the widest of these types that their place allows: fewer pieces hold more bytes.
_WIDE = ((16, torch.complex128), (8, torch.int64), (4, torch.int32))


def copy_segments(tensors: Sequence[torch.Tensor], segments: Sequence[Segment], slot: StagingBuffer) -> None:
    """Copy every segment to its place in the slot. CPU tensors: done on return; CUDA tensors: enqueued on the current
    stream. Blocks; releases the GIL while bytes move, once for hundreds of tensors. The tensors must stay unchanged
    meanwhile."""
    with torch.no_grad():
        copies = _Copies(slot.tensor)
        for segment in segments:
            tensor = tensors[segment.piece]
            if not is_plain(tensor):
                item = tensor.element_size()
                target = slot.tensor[segment.extent_offset : segment.extent_offset + segment.nbytes]
                first = segment.source_offset // item
                _copy_strided(tensor.detach(), first, first + segment.nbytes // item, target.view(tensor.dtype))
            elif segment.nbytes == tensor.nbytes and tensor.numel() <= _SERIAL_ELEMENTS:
                copies.add_whole(tensor, segment.extent_offset)
            else:
                copies.add_part(tensor, segment)
        copies.flush()


class _Copies:
    """Collects copies into a slot, and makes many in one call."""

    def __init__(self, slot: torch.Tensor) -> None:
        self._slot = slot
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        #: Whole tensors of one dtype that lie side by side in the slot.
        self._run: list[torch.Tensor] = []
        self._begin = self._end = 0
        self._dtype: torch.dtype | None = None

    def add_whole(self, tensor: torch.Tensor, offset: int) -> None:
        """Copy a small tensor to this offset in the slot."""
        dtype = tensor.dtype
        if offset != self._end or dtype is not self._dtype or len(self._run) == _AT_ONCE:
            self._end_run()
            self._begin, self._dtype = offset, dtype
        self._run.append(tensor)
        self._end = offset + tensor.nbytes

    def add_part(self, tensor: torch.Tensor, segment: Segment) -> None:
        """Copy a part of a tensor, or a large one."""
        source = _flat_bytes(tensor.detach())[segment.source_offset : segment.source_offset + segment.nbytes]
        target = self._slot[segment.extent_offset : segment.extent_offset + segment.nbytes]
        if not tensor.is_cpu:
            self._add([target], [source])
            return
        place = source.storage_offset() | target.storage_offset() | segment.nbytes
        wide = next((dtype for nbytes, dtype in _WIDE if place % nbytes == 0), torch.uint8)
        self._add(target.view(wide).split(_SERIAL_ELEMENTS), source.view(wide).split(_SERIAL_ELEMENTS))

    def flush(self) -> None:
        """Make the copies that were added. Call it at last."""
        self._end_run()
        self._copy()

    def _end_run(self) -> None:
        run, dtype = self._run, self._dtype
        if not run or dtype is None:
            return
        self._run = []
        if (self._slot.storage_offset() + self._begin) % dtype.itemsize:
            bytes_of = [_flat_bytes(tensor.detach()) for tensor in run]
            self._add(self._slot[self._begin : self._end].split([len(one) for one in bytes_of]), bytes_of)
            return
        # this makes the views of all places in one call
        self._add(_unflatten_dense_tensors(self._slot[self._begin : self._end].view(dtype), run), run)

    def _add(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self._targets += targets
        self._sources += sources
        if len(self._targets) >= _AT_ONCE:
            self._copy()

    def _copy(self) -> None:
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources, non_blocking=True)
            self._targets, self._sources = [], []


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


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
