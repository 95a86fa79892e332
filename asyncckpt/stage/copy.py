"""Copies tensors' bytes into the arena: the only code that touches tensor memory on the way out."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import _utils as torch_utils

from asyncckpt.codecs.blosc import split_places
from asyncckpt.codecs.codecs import MIN_PLANES_CHUNK_BYTES
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.tensor_bytes import _copy_strided, is_plain
from asyncckpt.stage.units import Unit
from asyncckpt.types import FRAME_HEADER_BYTES, Extent, Segment

#: Where torch may use threads, a tensor is copied in pieces of so many elements: from 32,768 on, it would.
_SERIAL_ELEMENTS = 7 << 12
#: So many pieces go into one call. More objects at a time would have Python's collector run.
_AT_ONCE = 512
_split: Callable[[torch.Tensor, int | list[int]], Sequence[torch.Tensor]] = torch.Tensor.split
_unflatten: Callable[[torch.Tensor, Sequence[torch.Tensor]], Sequence[torch.Tensor]] = (
    torch_utils._unflatten_dense_tensors
)
#: Large tensors are copied as the widest of these types that their place allows: fewer pieces hold more bytes.
_WIDE = ((16, torch.complex128), (8, torch.int64), (4, torch.int32))


def copy_segments(tensors: Sequence[torch.Tensor], segments: Sequence[Segment], slot: StagingBuffer) -> None:
    """Copy every segment to its place in the slot. CPU tensors: done on return; CUDA tensors: enqueued on the current
    stream. Blocks; releases the GIL while bytes move, once for hundreds of tensors. The tensors must stay unchanged
    meanwhile."""
    with torch.no_grad(), _without_threads() as alone:
        copies = _Copies(slot.tensor)
        for segment in segments:
            tensor = tensors[segment.piece]
            whole = segment.nbytes == tensor.nbytes
            # nothing else is asked of most tensors: each call gives the interpreter up, and may wait to get it back
            if whole and (alone or tensor.numel() <= _SERIAL_ELEMENTS or not tensor.is_cpu):
                copies.add_whole(tensor, segment.extent_offset)
            elif is_plain(tensor):
                copies.add_part(tensor, segment)
            else:
                item = tensor.element_size()
                target = slot.tensor[segment.extent_offset : segment.extent_offset + segment.nbytes]
                first = segment.source_offset // item
                _copy_strided(tensor.detach(), first, first + segment.nbytes // item, target.view(tensor.dtype))
        copies.flush()


@contextlib.contextmanager
def _without_threads() -> Iterator[bool]:
    """Keep torch from using several threads for what this thread copies meanwhile: they are training's. Yields False
    where that cannot be said."""
    threads = torch.get_num_threads()
    if threads == 1 or _set_threads is None:
        yield threads == 1
        return
    _set_threads(1)
    try:
        yield torch.get_num_threads() == 1
    finally:
        _set_threads(threads)


def _openmp() -> Callable[[int], object] | None:
    """Return the function of the OpenMP library behind torch that says how many threads the calling thread uses, and
    leaves others alone; torch's own is for all threads. None where torch was built without it."""
    try:
        found = ctypes.PyDLL(torch._C.__file__).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_int], None
    return cast("Callable[[int], object]", found)


_set_threads = _openmp()


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
        """Copy a tensor to this offset in the slot, in one piece."""
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
        place = source.data_ptr() | int(source.storage_offset()) | int(target.storage_offset()) | segment.nbytes
        wide = next((dtype for nbytes, dtype in _WIDE if place % nbytes == 0), torch.uint8)
        self._add(_split(target.view(wide), _SERIAL_ELEMENTS), _split(source.view(wide), _SERIAL_ELEMENTS))

    def flush(self) -> None:
        """Make the copies that were added. Call it at last."""
        self._end_run()
        self._copy()

    def _end_run(self) -> None:
        run, dtype = self._run, self._dtype
        if not run or dtype is None:
            return
        self._run = []
        if (int(self._slot.storage_offset()) + self._begin) % dtype.itemsize:
            bytes_of = [_flat_bytes(tensor.detach().resolve_conj().resolve_neg()) for tensor in run]
            self._add(_split(self._slot[self._begin : self._end], [len(one) for one in bytes_of]), bytes_of)
            return
        # this makes the views of all places in one call
        self._add(_unflatten(self._slot[self._begin : self._end].view(dtype), run), run)

    def _add(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self._targets += targets
        self._sources += sources
        if len(self._targets) >= _AT_ONCE:
            self._copy()

    def _copy(self) -> None:
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources, non_blocking=True)
            self._targets, self._sources = [], []


def host_writes(tensors: Sequence[torch.Tensor], unit: Unit) -> bool:
    """Whether the host itself writes into the slot while this unit is staged: a header, padding, or CPU tensors."""
    if unit.gaps or not all(extent.segments for extent in unit.extents):
        return True
    if any(extent.header or extent.item_bytes for extent in unit.extents):
        return True
    return any(tensors[segment.piece].is_cpu for segment in unit.segments)


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


def fill_gaps(slot: StagingBuffer, gaps: Sequence[tuple[int, int]]) -> None:
    """Write zeros into these ranges of the slot. Done on return."""
    for begin, end in gaps:
        slot.tensor[begin:end].zero_()


def write_header(slot: StagingBuffer, place: int, header: bytes) -> None:
    """Put the format's bytes at the beginning of an extent, which begins at ``place`` in the slot."""
    slot.view[place : place + len(header)] = header


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
