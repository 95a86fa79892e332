"""A stand-in takes the place of a device's streams: what is enqueued runs later, on a thread, in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from asyncckpt import Checkpointer, NotEnoughSpace, WriterOptions
from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import LocalTensor

PATIENCE_SECONDS = 20.0


class Event:
    """Says whether a copy on a ``Stream`` has run. ``waiting`` is called by whoever waits for it."""

    def __init__(self, waiting: Callable[[], object] = lambda: None) -> None:
        self._ran = threading.Event()
        self._waiting = waiting

    def done(self) -> bool:
        return self._ran.is_set()

    def wait(self) -> None:
        self._waiting()
        assert self._ran.wait(PATIENCE_SECONDS)

    def wait_on(self, stream: Stream) -> None:
        stream.tasks.put(self.wait)


class Stream:
    """Runs the copies of one save, in the order in which they were enqueued, while ``open`` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.tasks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.queued = self.ran = 0
        self.waited_for = threading.Event()
        self.after_each: Callable[[], object] = lambda: None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            task = self.tasks.get()
            if not self.open.wait(PATIENCE_SECONDS):  # the test ended without opening it
                return
            task()

    def __bool__(self) -> bool:
        return True

    def enqueue(self, copy: Callable[[], None], after: Sequence[Event], queued: list[Any]) -> None:
        for earlier in after:
            earlier.wait_on(self)
        event = Event(self.waited_for.set)

        def run() -> None:
            copy()
            self.ran += 1
            event._ran.set()

        self.tasks.put(run)
        queued.append(event)
        self.queued += 1
        self.after_each()

    def make_current_wait(self) -> None:
        """Do nothing, as the test changes nothing."""

    def synchronize(self) -> None:
        event = Event()
        self.tasks.put(event._ran.set)
        event.wait()


class Streams:
    """Takes the place of ``CopyStreams``: each save's copies run on the next of ``streams``."""

    def __init__(self, *streams: Stream) -> None:
        self._left = list(streams)

    def of(self, _pieces: Iterable[LocalTensor]) -> Stream:
        return self._left.pop(0)


class Landed(PosixOps):
    """Lets writes go on only once ``landed`` is set. While ``full``, there is no space, which a save learns when
    ``enough`` of it has been staged."""

    def __init__(self, enough: Callable[[], bool] = lambda: True) -> None:
        self.landed = threading.Event()
        self.full = False
        self._enough = enough

    def free_bytes(self, path: str) -> int:
        if not self.full:
            return super().free_bytes(path)
        assert until(self._enough)
        return 0

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        assert self.landed.wait(PATIENCE_SECONDS)
        return super().pwrite(fd, data, offset)


def until(true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    patience = time.monotonic() + seconds
    while not true() and time.monotonic() < patience:
        time.sleep(0.005)
    return true()


def until_it_failed(run: Checkpointer) -> None:
    """Wait until the saves have failed, so that what was copied is handed on only then: memory is given back at
    once."""
    flights = run._in_flight.all()
    assert until(lambda: all(flight.save.scope.error is not None for flight in flights))


def a_save_after_one_that_failed(
    path: Path, streams: Sequence[Stream], states: Sequence[dict[str, torch.Tensor]]
) -> None:
    """Save twice: the copies of the first save are still queued when the second takes its memory, and run last of all
    if nobody waits for them."""
    first, second = streams
    run = Checkpointer(path, writer=WriterOptions(reuse_unchanged=False))
    first.after_each = lambda: until_it_failed(run)
    run.prepare(max(states, key=lambda state: sum(tensor.nbytes for tensor in state.values())))
    run._arena.wait_prepared(PATIENCE_SECONDS)
    run._starter._streams = Streams(*streams)  # type: ignore[assignment]
    run._store.ops = ops = Landed(lambda: first.queued > 0)
    ops.full = True
    failed = run.save(1, states[0])
    first.after_each = lambda: None
    assert isinstance(failed.exception(PATIENCE_SECONDS), NotEnoughSpace)
    assert until(lambda: run._arena.free_bytes() == run._arena.budget_bytes), "its memory did not come back at once"
    assert first.ran == 0, "nothing was queued any more"
    ops.full = False
    if second is not first:
        second.open.set()
    saved: list[Any] = []
    saving = threading.Thread(target=lambda: saved.append(run.save(2, states[1])))
    first.waited_for.clear()
    saving.start()
    # whoever writes into that memory waits for the copies, or has written by now
    until(lambda: first.waited_for.is_set() or (bool(saved) and (second is first or second.ran > 0)), 5.0)
    first.open.set()
    saving.join()
    assert until(lambda: first.ran > 0)
    for stream in streams:
        stream.synchronize()
    ops.landed.set()
    saved[0].result(PATIENCE_SECONDS)
    try:
        assert run.verify(2) == [], "acknowledged and damaged"
        found = run.load_tensors(2)
        for name, tensor in states[1].items():
            assert torch.equal(found[f"{name}.value"], tensor), f"{name} is not as it was saved"
    finally:
        run.close()


def ones_and_twos() -> list[dict[str, torch.Tensor]]:
    return [{name: torch.full((50_000,), value) for name in "abc"} for value in (1.0, 2.0)]
