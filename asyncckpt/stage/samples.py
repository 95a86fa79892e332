"""Small samples of deferred tensors are digested at ``save`` and compared with what is staged, and with the memory when
the update begins: in-place changes that torch does not count (through ``.data``, NumPy, fused kernels) show there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from asyncckpt.codecs.blosc import split_places
from asyncckpt.memory import cuda
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.tensor_bytes import is_plain
from asyncckpt.stage.eager import OwnedMemory
from asyncckpt.stage.live_bytes import LiveTensor, digest_at, digest_of, digest_of_image, live
from asyncckpt.types import FRAME_HEADER_BYTES, Extent, Layout, LocalTensor, Segment

_SAMPLE_BYTES = 8 << 10
_STRIDED_BYTES = 1 << 10
_LEAST_SAMPLES, _MOST_SAMPLES = 16, 64
#: The training thread takes samples of CPU tensors for so long at each save, the first ones not counted.
_BUDGET_SECONDS = 0.1e-3


@dataclass(slots=True)  # not frozen: a save makes dozens on the training thread
class Sample:
    """A range of a tensor's row-major bytes, which is staged with extent ``extent``. ``digest``: of these bytes at
    ``save``, or a function that returns it and may wait for the device. ``where``: the tensor's memory, None on a
    device."""

    piece: int
    extent: int
    segment: Segment
    begin: int
    nbytes: int
    digest: int | Callable[[], int]
    where: LiveTensor | None

    def then(self) -> int:
        """Return the digest at ``save``. May wait for the device."""
        return self.digest if isinstance(self.digest, int) else self.digest()


def _segments_by_piece(layout: Layout) -> Mapping[int, Sequence[tuple[int, Segment]]]:
    """List, for each piece, its segments in order, with the index of the extent that each lies in."""
    found: dict[int, list[tuple[int, Segment]]] | None = layout.cache.get("segments by piece")
    if found is None:
        found = layout.cache["segments by piece"] = {}
        for number, extent in enumerate(layout.extents()):
            for segment in extent.segments:
                found.setdefault(segment.piece, []).append((number, segment))
    return found


class Sampler:
    """Takes samples, of other tensors and other places at each save. For the training thread."""

    def __init__(self) -> None:
        self._turn = 0
        self._next = 0

    def take(
        self,
        pieces: Sequence[LocalTensor],
        deferred: Sequence[int],
        owned: OwnedMemory,
        layout: Layout,
    ) -> list[Sample]:
        """Take a sample of as many of the pieces with indexes ``deferred`` as there is time for, in turn. Copies from a
        device are enqueued, not waited for."""
        found: list[Sample] = []
        if not deferred:
            return found
        segments = _segments_by_piece(layout)
        on_device: dict[torch.device, list[tuple[int, int, Segment, int, int]]] = {}
        self._turn += 1
        step = 0
        give_up = time.perf_counter() + _BUDGET_SECONDS
        for step in range(min(len(deferred), _MOST_SAMPLES)):
            index = deferred[(self._next + step) % len(deferred)]
            tensor, places = pieces[index].tensor, segments.get(index)
            owner = owned.holder_of(tensor)
            if not places or owner is None:
                continue
            plain = is_plain(tensor)
            number, segment, begin, nbytes = self._place(tensor.element_size(), plain, places)
            if tensor.is_cpu:
                value = digest_at(tensor.data_ptr() + begin, nbytes) if plain else digest_of(tensor, begin, nbytes)
                found.append(Sample(index, number, segment, begin, nbytes, value, live(tensor, owner)))
            elif tensor.is_cuda and plain:
                on_device.setdefault(tensor.device, []).append((index, number, segment, begin, nbytes))
            if step >= _LEAST_SAMPLES and time.perf_counter() > give_up:
                break
        self._next = (self._next + step + 1) % len(deferred)
        for chosen in on_device.values():
            found += _from_device(pieces, chosen)
        return found

    def _place(self, item: int, plain: bool, places: Sequence[tuple[int, Segment]]) -> tuple[int, Segment, int, int]:
        """Choose a range: every other time at the end, which is copied last, so that it has seen every change of the
        whole tensor that was made before the rest was copied."""
        most = _SAMPLE_BYTES if plain else _STRIDED_BYTES
        at_end = self._turn % 2 == 1
        number, segment = places[-1 if at_end else self._turn // 2 % len(places)]
        nbytes = min(most, segment.nbytes) // item * item
        room = (segment.nbytes - nbytes) // item
        offset = room if at_end else (self._turn * 0x9E3779B1) % (room + 1)
        return number, segment, segment.source_offset + offset * item, nbytes


def _from_device(pieces: Sequence[LocalTensor], chosen: Sequence[tuple[int, int, Segment, int, int]]) -> list[Sample]:
    parts = []
    for index, _, _, begin, nbytes in chosen:
        flat = pieces[index].tensor.detach().reshape(-1).view(torch.uint8)
        parts.append(flat[begin : begin + nbytes])
    try:
        gathered = torch.cat(parts)
        here = torch.empty(len(gathered), dtype=torch.uint8, device="cpu", pin_memory=True)
        here.copy_(gathered, non_blocking=True)
        event = torch.cuda.current_stream(gathered.device).record_event()
    except RuntimeError:  # a device without memory is sampled another time
        return []
    found: list[Sample] = []
    at = 0
    for index, number, segment, begin, nbytes in chosen:

        def digest(at: int = at, nbytes: int = nbytes) -> int:
            with cuda.on(gathered.device):
                event.synchronize()
            return digest_of_image(here[at : at + nbytes].numpy().data)

        found.append(Sample(index, number, segment, begin, nbytes, digest, None))
        at += nbytes
    return found


def staged_as_sampled(sample: Sample, extent: Extent, slot: StagingBuffer) -> bool:
    """Whether the sampled bytes were staged as they were at ``save``. For whoever has the slot, once its copies have
    run."""
    first = sample.begin - sample.segment.source_offset
    if not slot.split:
        begin = sample.segment.extent_offset + first
        staged = digest_of_image(slot.view[begin : begin + sample.nbytes])
    else:
        item = extent.item_bytes
        places = split_places(extent.nbytes - FRAME_HEADER_BYTES, item)
        image = np.frombuffer(slot.view, np.uint8)
        begin, end = first // item, (first + sample.nbytes) // item
        planes = np.stack([image[place + begin : place + end] for place in places])
        staged = digest_of_image(np.ascontiguousarray(planes.T).data)
    return staged == sample.then()


def changed_samples(samples: Sequence[Sample], indexes: Collection[int] | None) -> set[int]:
    """Return the pieces whose sampled bytes are not in memory now what they were at ``save``. ``indexes``: the pieces
    to look at, None for all. Of tensors on a device, and of memory that is gone, nothing is known."""
    changed: set[int] = set()
    for sample in samples:
        if sample.where is None or (indexes is not None and sample.piece not in indexes):
            continue
        tensor = sample.where.now()
        if tensor is not None and digest_of(tensor, sample.begin, sample.nbytes) != sample.then():
            changed.add(sample.piece)
    return changed
