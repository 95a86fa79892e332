"""Copies into staging memory run on streams; this makes the streams and tells when the copies have run.

Copies of CPU tensors run at once. Those of CUDA tensors are enqueued on one stream a device, which lives as long as the
checkpointer: a new stream for each save would have the allocator keep a cache for each.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from asyncckpt.memory import cuda
from asyncckpt.memory.arena import QueuedCopy


class Copies(Protocol):
    """Makes the copies of one save. Thread-safe. The object is true where copies are enqueued and run later."""

    def __bool__(self) -> bool: ...

    def enqueue(self, copy: Callable[[], None], after: Sequence[QueuedCopy], queued: list[QueuedCopy]) -> None:
        """Call ``copy``, which makes the copies, or enqueues them so that they run after those in ``after``. Enqueued
        copies are added to ``queued``, also where ``copy`` raises half-way; wait for them there."""

    def make_current_wait(self) -> None:
        """Have whatever training enqueues from now on run after the copies enqueued so far."""

    def synchronize(self) -> None:
        """Block until the copies enqueued so far have run."""


class CopyStreams:
    """Holds the copy streams of one checkpointer, made when a save needs them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, devices: Collection[torch.device]) -> Copies:
        """Return the object that makes the copies of one snapshot, whose tensors lie on the CPU and on these CUDA
        devices. They see the tensors as training has left them at this call."""
        make: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        with self._lock:
            for device in set(devices) - set(self._streams):
                with cuda.on(device):
                    self._streams[device] = make(device)
            streams = {device: self._streams[device] for device in devices}
        for device, stream in streams.items():
            with cuda.on(device):
                stream.wait_stream(torch.cuda.current_stream(device))
        return _StreamCopies(streams)


def none_queued() -> Copies:
    """Return the copies of a save that has ended."""
    return _StreamCopies({})


class _StreamCopies:
    def __init__(self, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        self._streams = streams

    def __bool__(self) -> bool:
        return bool(self._streams)

    def enqueue(self, copy: Callable[[], None], after: Sequence[QueuedCopy], queued: list[QueuedCopy]) -> None:
        with contextlib.ExitStack() as stack:
            for device in list(self._streams)[:1]:  # torch goes back to the thread's device, which must not be another
                stack.enter_context(cuda.on(device))
            for stream in self._streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            for earlier in after:
                for stream in self._streams.values():
                    earlier.wait_on(stream)
            try:
                copy()
            finally:  # an error of the copy is worth more than one of recording
                queued += [_recorded(stream, device) for device, stream in self._streams.items()]

    def make_current_wait(self) -> None:
        for device, stream in self._streams.items():
            with cuda.on(device):
                torch.cuda.current_stream(device).wait_stream(stream)

    def synchronize(self) -> None:
        for device, stream in self._streams.items():
            with cuda.on(device):
                stream.synchronize()


def _recorded(stream: torch.cuda.Stream, device: torch.device) -> QueuedCopy:
    try:
        return RecordedCopy(stream.record_event(), device)
    except RuntimeError:
        return UnrecordedCopy(stream, device)


class RecordedCopy:
    """The copies enqueued on a stream of ``device`` before an event. Any thread may ask for them."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device
        self._has_run = False

    def done(self) -> bool:
        query: Callable[[], bool] = self._event.query
        if not self._has_run:
            with cuda.on(self._device):
                self._has_run = query()
        return self._has_run

    def wait(self) -> None:
        if not self._has_run:
            with cuda.on(self._device):
                self._event.synchronize()
            self._has_run = True

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        stream.wait_event(self._event)


class UnrecordedCopy:
    """The copies enqueued on a stream whose device took no event: they have run once the whole stream has."""

    def __init__(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        self._stream = stream
        self._device = device

    def done(self) -> bool:
        query: Callable[[], bool] = self._stream.query
        with cuda.on(self._device):
            return query()

    def wait(self) -> None:
        with cuda.on(self._device):
            self._stream.synchronize()

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(self._stream)
