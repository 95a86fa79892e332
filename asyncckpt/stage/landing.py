"""What was drained from a device is found to be in staging memory by a flag, and handed on then."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np

from asyncckpt.stage.device import SnapshotDevice
from asyncckpt.stage.staged import StagedUnit, UnitSink

_POLL_SECONDS = 0.001
#: A device that has set no flag for so long is asked whether it has failed.
_LOOK_SECONDS = 1.0


class LandedCopy:
    """The copies before a flag. Looks at memory alone."""

    def __init__(
        self, device: SnapshotDevice, flags: np.ndarray[Any, np.dtype[np.int32]], number: int, generation: int
    ) -> None:
        self._device = device
        self._flags = flags
        self._number = number
        self._generation = generation

    def is_of(self, device: SnapshotDevice) -> bool:
        """Whether the copies are on this device's stream."""
        return self._device is device

    def done(self) -> bool:
        return bool(self._flags[self._number] >= self._generation)

    def wait(self) -> None:
        look = time.monotonic() + _LOOK_SECONDS
        while not self.done():
            time.sleep(_POLL_SECONDS)
            if time.monotonic() > look:
                if self._device.is_idle() and not self.done():
                    raise RuntimeError(f"{self._device.name} has nothing left to do and has not copied the snapshot")
                look = time.monotonic() + _LOOK_SECONDS

    def wait_on(self, stream: Any) -> None:
        self._device.let_follow(stream)


class AllCopies:
    """All copies that a device has enqueued, which took no flag."""

    def __init__(self, device: SnapshotDevice) -> None:
        self._device = device

    def done(self) -> bool:
        return self._device.is_idle()

    def wait(self) -> None:
        self._device.synchronize()

    def wait_on(self, stream: Any) -> None:
        self._device.let_follow(stream)


class Landing:
    """Looks at flags, on one thread that the first unit starts, and hands each unit on once it is there, in order.
    Memory of a save that has failed is handed on then, too, and not before."""

    def __init__(self) -> None:
        self._units: SimpleQueue[tuple[UnitSink, StagedUnit] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = self._closed = False

    def put(self, sink: UnitSink, staged: StagedUnit) -> None:
        """Take a unit whose copies are queued. Thread-safe; never blocks."""
        with self._lock:
            if not self._closed and self._runs():
                self._units.put((sink, staged))
                return
        sink.submit(staged)  # whoever gets it waits for it

    def _runs(self) -> bool:
        if not self._started:
            try:
                threading.Thread(target=self._run, name="asyncckpt-landing", daemon=True).start()
            except RuntimeError:  # the system gives no more threads
                return False
            self._started = True
        return True

    def close(self) -> None:
        """End the thread after the units that it has. Does not wait."""
        with self._lock:
            self._closed = True
            self._units.put(None)

    def _run(self) -> None:
        while (item := self._units.get()) is not None:
            sink, staged = item
            try:
                staged.wait_copied()
                staged = replace(staged, slot=replace(staged.slot, copies=()), wait_copied=_nothing)
            except BaseException as error:  # the sink fails the save with it; who gets the memory waits for the copies
                staged = replace(staged, wait_copied=functools.partial(_raise, error))
            sink.submit(staged)
            del item, sink, staged


def _nothing() -> None:
    """Do nothing: the bytes are there."""


def _raise(error: BaseException) -> None:
    raise error


class LandedSink:
    """Hands units on to ``sink`` once they are there."""

    def __init__(self, landing: Landing, sink: UnitSink) -> None:
        self._landing = landing
        self._sink = sink

    def submit(self, staged: StagedUnit) -> None:
        self._landing.put(self._sink, staged)

    def give_memory_back(self) -> None:
        self._sink.give_memory_back()
