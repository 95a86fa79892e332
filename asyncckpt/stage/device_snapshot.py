"""A snapshot on the device: inside ``save`` the state is gathered into the device's memory as the image of the files,
and from there it is drained into staging memory while training goes on, whatever that changes.

A drain is many copies of at most 64 MiB, with a tiny kernel after each, so that a small copy of training's own comes in
between, and a flag of 4 bytes after the last one of a unit, which says that the unit is there: no events, and one
thread that looks at the flags (docs/design/029-snapshot-on-the-device.md).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from asyncckpt import interrupts
from asyncckpt.errors import InvalidOption, NotEnoughMemory
from asyncckpt.events import EventBus, SnapshotOnHost
from asyncckpt.memory.arena import QueuedCopy, StagingBuffer
from asyncckpt.stage.device import CudaDevice, SnapshotDevice
from asyncckpt.stage.gather import Gather
from asyncckpt.stage.image_plan import ImagePlan, image_plan
from asyncckpt.stage.landing import AllCopies, LandedCopy, Landing
from asyncckpt.stage.options import Snapshot
from asyncckpt.stage.units import Unit
from asyncckpt.types import Layout

#: Whether ``snapshot="auto"`` takes the device where there is room. No GPU has run it yet.
AUTO_TAKES_DEVICE = False
#: A larger copy would keep training's own small ones waiting for longer.
_CHUNK_BYTES = 64 << 20
#: So much of a device stays free, at least: what training takes varies from iteration to iteration.
_RESERVE_SHARE = 32
_LEAST_RESERVE_BYTES = 512 << 20
#: Plans whose views and tables are kept: full and weights-only, before and after the optimizer has state.
_KEPT_PLANS = 4


class DeviceSnapshots:
    """Takes the snapshots of one checkpointer on the device. ``begin`` and ``close`` are for the training thread.

    ``make_device``: makes the device that a state lies on, once.
    """

    def __init__(
        self, snapshot: Snapshot, events: EventBus, make_device: Callable[[torch.device], SnapshotDevice] = CudaDevice
    ) -> None:
        self._snapshot = snapshot
        self._events = events
        self.make_device = make_device
        self._device: SnapshotDevice | None = None
        self._at: torch.device | None = None
        self._image: torch.Tensor | None = None
        self._gathers: dict[int, Gather] = {}
        self._flags: _Flags | None = None
        self._generation = 0
        #: The sizes of which was said that there is no room for them.
        self._told: set[int] = set()
        self._latest: ImageCopies | None = None
        self.landing = Landing()

    def begin(
        self, step: int, layout: Layout, devices: Collection[torch.device], vouched: object
    ) -> ImageCopies | None:
        """Return what takes the snapshot of a save; None where it is copied to the host in the other way. Its
        pieces lie on these CUDA ``devices`` and on the host; ``vouched``: see ``Gather.enqueue``. Allocates the
        device's memory, the first time. Raises ``InvalidOption`` and ``NotEnoughMemory`` where only the device will do
        and cannot."""
        demanded = self._snapshot == "device"
        if not (demanded or (self._snapshot == "auto" and AUTO_TAKES_DEVICE)):
            return None
        plan = image_plan(layout)
        if not plan.nbytes:
            return None
        if len(devices) != 1:
            if not demanded:
                return None
            where = "on several: " + ", ".join(sorted(map(str, devices))) if devices else "on none"
            raise InvalidOption(
                f"step {step}: StagingOptions(snapshot='device') takes a state that lies on one CUDA device, and this "
                f"one lies {where}. Use snapshot='auto', or 'host'"
            )
        (at,) = devices
        try:
            image = self._memory(step, at, plan.nbytes)
        except NotEnoughMemory as error:
            if demanded:
                raise
            if plan.nbytes not in self._told:
                self._told.add(plan.nbytes)
                self._events.emit(SnapshotOnHost(step=step, nbytes=plan.nbytes, reason=str(error)))
            return None
        device = self._device
        assert device is not None
        gather = self._gather(plan, image, device)
        if self._flags is None or self._flags.count < len(plan.places):
            with _outside_autograd():
                self._flags = _Flags(device, len(plan.places))
        self._generation += 1
        return ImageCopies(device, gather, image, self._flags, self._generation, self._latest, self._taken, vouched)

    def _taken(self, copies: ImageCopies) -> None:
        """Note that a save takes its snapshot, so that the next one waits until it is drained."""
        self._latest = copies

    def _memory(self, step: int, at: torch.device, nbytes: int) -> torch.Tensor:
        """Return memory for an image of ``nbytes``: that of the save before, if it is large enough."""
        if self._device is None or self._at != at:
            self._device, self._at, self._image, self._flags = self.make_device(at), at, None, None
        device, image = self._device, self._image
        if image is not None and len(image) >= nbytes:
            return image
        free, total = device.room_bytes()
        reserve = max(total // _RESERVE_SHARE, _LEAST_RESERVE_BYTES)
        if nbytes > free - reserve:
            raise NotEnoughMemory(
                f"step {step}: a snapshot on {device.name} takes {nbytes} bytes of it, and {reserve} more stay free "
                f"for training; of its {total} bytes, {max(0, free)} are free where training takes most. Leave more of "
                f"it free, or use StagingOptions(snapshot='host')"
            )
        self._image = device.memory(nbytes)
        self._gathers.clear()
        return self._image

    def _gather(self, plan: ImagePlan, image: torch.Tensor, device: SnapshotDevice) -> Gather:
        found = self._gathers.get(id(plan))
        if found is None or found.plan is not plan:
            if len(self._gathers) >= _KEPT_PLANS:
                self._gathers.clear()
            found = self._gathers[id(plan)] = Gather(plan, image, device.has, device.make_table)
        return found

    def is_idle(self) -> bool:
        """Whether no copy of a snapshot is queued on the device. Raises ``RuntimeError`` where that has failed."""
        return self._device is None or self._device.is_idle()

    def close(self) -> None:
        """Give the device's memory back, and end the thread once all that was handed to it is there. Does not wait."""
        self.landing.close()
        self._device = self._image = self._flags = self._latest = None
        self._gathers.clear()


class ImageCopies:
    """Makes the copies of one save from its image. ``take`` is for the training thread; what else is called may be on
    any. Is ``streams.Copies`` to a staging job, whose training never waits."""

    def __init__(
        self,
        device: SnapshotDevice,
        gather: Gather,
        image: torch.Tensor,
        flags: _Flags,
        generation: int,
        before: ImageCopies | None,
        taken: Callable[[ImageCopies], object],
        vouched: object,
    ) -> None:
        self._device = device
        self._gather = gather
        self._plan = gather.plan
        self._image = image
        self._flags = flags
        self._generation = generation
        self._before = before
        self._taken = taken
        self._vouched = vouched
        #: What the image held before, besides tensors.
        self._written = before.written if before is not None and before.image_is(image) else None
        #: Set once nothing of the image is needed but what was enqueued.
        self.drained = threading.Event()
        self._lock = threading.Lock()
        self._count = 0

    def __bool__(self) -> bool:
        return True

    @property
    def written(self) -> ImagePlan | None:
        """Of which plan the image has the headers, and zeros between."""
        return self._written

    def image_is(self, image: torch.Tensor) -> bool:
        """Whether this save's image lies in that memory."""
        return self._image is image

    # -- in ``save`` -------------------------------------------------------------------------------------------------

    def wait_free(self, deadline: float | None) -> bool:
        """Block until the save before needs no more of the image than is enqueued; False where ``deadline``, by
        ``time.monotonic``, passed first."""
        before, self._before = self._before, None
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        return before is None or interrupts.wait_for(before.drained.wait, remaining)

    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        """Enqueue the gathering of the tensors. What training enqueues from now on runs after it, so that the snapshot
        is of this moment. Does not wait for the device. Raises ``RuntimeError`` where the device does."""
        device, flags = self._device, self._flags
        self._taken(self)
        device.follow_training()
        written, self._written = self._written, None
        try:
            with _outside_autograd(), device.queueing():
                if written is not self._plan:
                    device.enqueue("fill", functools.partial(_write_constants, self._plan, self._image))
                device.enqueue("gather", functools.partial(self._gather.enqueue, tensors, self._vouched))
                device.enqueue("fill", functools.partial(flags.value.fill_, self._generation))
        finally:
            device.hold_training()
        self._written = self._plan

    # -- while it is drained -----------------------------------------------------------------------------------------

    def queueing(self) -> Any:
        """Return what to be in while units are drained one after the other: then each of them costs less."""
        return self._device.queueing()

    def drain(self, unit: Unit, slot: StagingBuffer) -> None:
        """Enqueue the copies of a unit from the image into its slot. For ``enqueue``."""
        target = slot.tensor
        for place, begin, nbytes in self._plan.ranges(unit, _CHUNK_BYTES):
            to, source = target[begin : begin + nbytes], self._image[place : place + nbytes]
            self._device.enqueue("drain", functools.partial(to.copy_, source, non_blocking=True))
            self._device.enqueue("tick", functools.partial(self._flags.ticks.add_, 1))

    def enqueue(self, copy: Callable[[], None], after: Sequence[QueuedCopy], queued: list[QueuedCopy]) -> None:
        """See ``streams.Copies``."""
        with _outside_autograd(), self._device.queueing():
            for earlier in after:
                if not (isinstance(earlier, LandedCopy) and earlier.is_of(self._device)):  # those are in order anyway
                    self._device.follow(earlier)
            with self._lock:
                number, self._count = self._count, self._count + 1
            try:
                copy()
            finally:
                queued.append(self._flagged(number))

    def _flagged(self, number: int) -> QueuedCopy:
        """Enqueue a flag behind all that was enqueued, and return what looks at it."""
        flags = self._flags
        try:
            set_flag = functools.partial(flags.views[number].copy_, flags.value, non_blocking=True)
            self._device.enqueue("flag", set_flag)
        except (RuntimeError, IndexError):
            return AllCopies(self._device)
        return LandedCopy(self._device, flags.seen, number, self._generation)

    def make_current_wait(self) -> None:
        """Do nothing: training waits for the gathering alone."""

    def synchronize(self) -> None:
        """Do nothing: the snapshot is whole when ``save`` returns."""


@contextlib.contextmanager
def _outside_autograd() -> Iterator[None]:
    """Make tensors that are of use in every mode: what is made in inference mode is not, outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _write_constants(plan: ImagePlan, image: torch.Tensor) -> None:
    image[: plan.nbytes].zero_()
    for place, header in plan.headers:
        here = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        image[place : place + len(header)].copy_(here.pin_memory() if image.is_cuda else here, non_blocking=True)


class _Flags:
    """Memory of the host that a device writes 4 bytes into after each unit: the number of the save, which it has in
    ``value``. One thread writes each flag at a time, as all is enqueued on one stream."""

    def __init__(self, device: SnapshotDevice, count: int) -> None:
        self.count = count
        flags = device.flags(count)
        self.views = torch.split(flags, 1)
        self.seen: np.ndarray[Any, np.dtype[np.int32]] = flags.numpy()
        own = device.memory(2 * 4).view(torch.int32)
        self.value, self.ticks = torch.split(own, 1)
