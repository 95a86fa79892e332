"""The staging job of a save whose snapshot was taken on the device: it brings the image to the host, unit by unit."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from asyncckpt.errors import ArenaBusy, SaveAbandoned
from asyncckpt.events import EventBus
from asyncckpt.memory.arena import Arena, QueuedCopy, StagingBuffer
from asyncckpt.scope import SaveScope
from asyncckpt.stage.device_snapshot import ImageCopies
from asyncckpt.stage.image import finish_image
from asyncckpt.stage.job import StagingJob
from asyncckpt.stage.landing import LandedSink, Landing
from asyncckpt.stage.staged import UnitSink
from asyncckpt.stage.streams import none_queued
from asyncckpt.stage.units import Unit
from asyncckpt.types import Layout


class DeviceJob(StagingJob):
    """Makes the copies of one save from its image on the device. What is not described here is as in ``StagingJob``.

    ``image``: takes the snapshot, and copies from it. ``landing``: hands units to ``sink`` once they are there.
    """

    is_apart = True
    _without_memory = "Leave more of the device's memory free, or use StagingOptions(snapshot='host')"

    def __init__(
        self,
        image: ImageCopies,
        landing: Landing,
        scope: SaveScope,
        tensors: Sequence[torch.Tensor],
        layout: Layout,
        arena: Arena,
        sink: UnitSink,
        events: EventBus,
        started_seconds: float,
    ) -> None:
        self._image: ImageCopies | None = image
        self._drained = image.drained
        super().__init__(scope, tensors, layout, arena, image, LandedSink(landing, sink), events, started_seconds)
        self._settle()

    def take_snapshot(self, deadline: float | None) -> None:
        """Have the device take the snapshot, and enqueue as much of its way to the host as there is room for now; the
        rest is left to ``run_in_background``. Blocks while the save before still needs the device's memory. For the
        training thread. Never raises: an error cancels the job."""
        image = self._image
        try:
            if image is None:
                return
            if not image.wait_free(deadline):
                self.cancel(self._too_slow(None))
            elif self._scope.error is None:
                image.take(self._tensors)
                with image.queueing():
                    self._work_while_there_is_room()
        except Exception as error:
            self.cancel(self._typed(error))
        except BaseException as error:
            self.cancel(self._interrupted(error))
            raise
        finally:
            self._drop_queue()

    def _work_while_there_is_room(self) -> None:
        full = False
        while not full:
            with self._lock:
                if not self._queue or self._scope.error is not None:
                    return
                work = self._next(self._queue)
                self._working.append(work)
            left = work
            try:
                while left and self._scope.error is None:
                    left = left[self._stage_unit(left, time.monotonic()) :]
            except ArenaBusy:
                full = True
            finally:
                with self._worked:
                    self._working.remove(work)
                    self._queue.extendleft(reversed(left))
                    self._worked.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Return True: the snapshot is taken."""
        return True

    def forget(self) -> None:
        super().forget()
        self._image = None  # whoever keeps a ``PendingSave`` must not keep the device's memory
        self._streams = none_queued()

    def _copy(self, unit: Unit, slot: StagingBuffer, queued: list[QueuedCopy]) -> StagingBuffer:
        image, first = self._image, unit.extents[0]
        if image is None:  # the save has failed
            raise SaveAbandoned(f"step {self.step}: given up before all of it was copied")
        if slot.copies and first.item_bytes:
            for earlier in slot.copies:  # of a save that failed: the device orders its own copies, not ours
                earlier.wait()
        image.enqueue(functools.partial(image.drain, unit, slot), slot.copies, queued)
        finish_image(first, slot)  # writes beside what the device writes
        return slot

    def _settle(self, patient: bool = False) -> None:
        super()._settle(patient)
        if self._done.is_set():
            self._drained.set()
