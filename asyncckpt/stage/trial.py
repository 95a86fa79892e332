"""A trial finds out whether a tensor may be deferred: whether it stays as it is from ``save`` to the update.

Its bytes were copied before ``save`` returned. When the update begins, its memory is digested and compared with what
was staged. On a CUDA device, checksums are enqueued at ``save`` and when the update begins, and nobody waits for them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from asyncckpt.memory.arena import QueuedCopy, StagingBuffer
from asyncckpt.stage.deferral import Deferral, Key
from asyncckpt.stage.live_bytes import LiveTensor, device_checksum, digest_of, digest_of_image, live, version_of
from asyncckpt.stage.streams import RecordedCopy
from asyncckpt.types import Extent, Segment

log = logging.getLogger("asyncckpt")


class Trial:
    """Tries the tensors of one save that have not earned to be deferred yet. Thread-safe; never blocks for long but in
    ``update_begins``, which digests the tensors in memory, once for each.

    ``tensors``: those on trial, by the index of their piece. ``owners``: the object of the optimizer that holds the
    memory of each. ``extents``: all of the save.
    """

    def __init__(
        self,
        deferral: Deferral,
        step: int,
        keys: Sequence[Key],
        tensors: Mapping[int, torch.Tensor],
        owners: Mapping[int, torch.Tensor],
        extents: Sequence[Extent],
    ) -> None:
        self._deferral = deferral
        self._step = step
        self._keys = keys
        self._lock = threading.Lock()
        self._live = {index: live(tensor, owners[index]) for index, tensor in tensors.items()}
        self._versions = {index: version_of(owners[index]) for index in tensors}
        on_device = {index: tensor for index, tensor in tensors.items() if tensor.is_cuda}
        self._segments: dict[int, list[Segment]] = {index: [] for index in tensors if index not in on_device}
        for extent in extents if self._segments else ():
            for segment in extent.segments:
                if segment.piece in self._segments:
                    self._segments[segment.piece].append(segment)
        self._staged: dict[int, dict[int, int]] = {index: {} for index in self._segments}
        self._found: dict[int, dict[int, int]] = {}
        self._checksums = _checksums(on_device)
        self._verdicts: list[Callable[[], bool]] = []

    @property
    def compares(self) -> bool:
        """Whether what is staged has to be looked at."""
        return bool(self._segments)

    def copied(self, extent: Extent, slot: StagingBuffer) -> None:
        """Note what was staged, before the slot is given back."""
        found: list[tuple[int, int, int]] = []
        for segment in extent.segments:
            if segment.piece in self._segments:
                begin = segment.extent_offset
                digest = digest_of_image(slot.view[begin : begin + segment.nbytes])
                found.append((segment.piece, segment.source_offset, digest))
        with self._lock:
            for index, offset, digest in found:
                self._staged[index][offset] = digest
        self._judge({index for index, _, _ in found})

    @property
    def awaits_update(self) -> bool:
        """Whether there are tensors whose update has not begun yet. Takes no lock."""
        return bool(self._live)

    def update_begins(self, indexes: Collection[int] | None) -> None:
        """Look at the tensors with these indexes, None for all, as their update is about to begin; each is looked at
        once. For the training thread."""
        with self._lock:
            chosen = [index for index in self._live if indexes is None or index in indexes]
            looked_at = {index: (self._live.pop(index), self._versions[index]) for index in chosen}
        if looked_at:
            self._look(looked_at)
            self._judge(chosen)

    def _look(self, looked_at: Mapping[int, tuple[LiveTensor, int]]) -> None:
        """Digest tensors where they live. One that is gone or has other memory proves nothing."""
        lost: list[int] = []
        found: dict[int, dict[int, int]] = {}
        on_device: dict[int, torch.Tensor] = {}
        for index, (where, version) in looked_at.items():
            owner, tensor = where.owner(), where.now()
            if owner is None or tensor is None:
                continue
            if version_of(owner) != version:
                lost.append(index)
            elif index in self._segments:
                segments = self._segments[index]
                found[index] = {one.source_offset: digest_of(tensor, one.source_offset, one.nbytes) for one in segments}
            elif index in self._checksums:
                on_device[index] = tensor
        with self._lock:
            self._found.update(found)
        if lost:
            self._deferral.lose(self._step, [self._keys[index] for index in lost])
        if on_device:
            self._compare_on_device(on_device)

    def _judge(self, indexes: Collection[int]) -> None:
        """Decide on tensors of which both digests are known by now."""
        earned: list[Key] = []
        lost: list[Key] = []
        with self._lock:
            for index in indexes:
                found = self._found.get(index)
                staged = self._staged.get(index, {})
                if found is not None and len(staged) == len(found):
                    (earned if staged == found else lost).append(self._keys[index])
                    del self._found[index]
        if earned:
            self._deferral.earn(earned)
        if lost:
            self._deferral.lose(self._step, lost)

    def _compare_on_device(self, tensors: Mapping[int, torch.Tensor]) -> None:
        now = _checksums(tensors)
        by_device: dict[torch.device, list[int]] = {}
        for index in now:
            by_device.setdefault(now[index].device, []).append(index)
        for device, indexes in by_device.items():
            before = torch.stack([self._checksums.pop(index) for index in indexes])
            equal = (before == torch.stack([now[index] for index in indexes])).all(1)
            here = torch.empty(len(indexes), dtype=torch.bool, device="cpu", pin_memory=True)
            here.copy_(equal, non_blocking=True)
            event = torch.cuda.current_stream(device).record_event()
            self._verdicts.append(self._verdict(RecordedCopy(event, device), here, indexes))

    def _verdict(self, copied: QueuedCopy, equal: torch.Tensor, indexes: Sequence[int]) -> Callable[[], bool]:
        def known() -> bool:
            if not copied.done():
                return False
            same = equal.tolist()
            self._deferral.earn(self._keys[index] for index, one in zip(indexes, same, strict=True) if one)
            self._deferral.lose(self._step, [self._keys[n] for n, one in zip(indexes, same, strict=True) if not one])
            return True

        return known

    def waits_for_device(self) -> bool:
        """Take in what devices have found out by now; return whether there is more to come. For the training thread,
        not while a CUDA graph is captured."""
        self._verdicts = [verdict for verdict in self._verdicts if not verdict()]
        return bool(self._verdicts)


def _checksums(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Enqueue a checksum of each tensor on its device. A device without the memory for it gives none."""
    found: dict[int, torch.Tensor] = {}
    for index, tensor in tensors.items():
        try:
            found[index] = device_checksum(tensor)
        except RuntimeError as error:
            log.debug("no checksum of a tensor on %s: %s", tensor.device, error)
    return found
