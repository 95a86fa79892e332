"""Copies that a device has not made yet: who takes staging memory after a save that failed must not get them on top.

Where there is no GPU, a thread stands in for a stream: what is enqueued on it runs later, in order.
"""

from __future__ import annotations

import errno
import gc
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.deferring import let_all_be_deferred
from support.examples import examples
from support.options import by_stage
from support.queued_copies import (
    PATIENCE_SECONDS,
    Event,
    Landed,
    Stream,
    a_save_after_one_that_failed,
    ones_and_twos,
    until,
    until_it_failed,
)

from asyncckpt import (
    ArenaBusy,
    Checkpointer,
    NotEnoughSpace,
    RunOptions,
    Safetensors,
    SaveAbandoned,
    SaveFailed,
    WriterOptions,
)
from asyncckpt.memory import arena as arenas
from asyncckpt.memory.arena import Arena, StagingBuffer
from asyncckpt.stage import job as staging
from asyncckpt.stage import streams as copy_streams
from asyncckpt.storage.posix import PosixOps


@pytest.mark.parametrize("own", [False, True], ids=["the same stream", "a stream of its own"])
def test_copies_of_a_save_that_failed_do_not_land_on_the_next(tmp_path: Path, own: bool) -> None:
    first = Stream()
    a_save_after_one_that_failed(tmp_path / "run", [first, Stream() if own else first], ones_and_twos())


def test_nor_do_they_land_on_what_the_host_itself_writes(tmp_path: Path) -> None:
    """A header and the zeros after the data, which no stream orders."""
    large = {"a": torch.full((300_000,), 1.0)}
    small = {f"t{n:03}": torch.full((30,), float(n)) for n in range(200)}
    first = Stream()
    a_save_after_one_that_failed(tmp_path / "run", [first, first], [large, small])


@examples(60)
@given(data=st.data())
def test_memory_comes_with_every_copy_that_may_still_write_into_it(data: st.DataObject) -> None:
    arena = Arena()
    arena.grow(64 << 10)
    assert arena.wait_prepared(PATIENCE_SECONDS)
    held: list[StagingBuffer] = []
    into: list[tuple[StagingBuffer, Event]] = []
    try:
        for _ in range(data.draw(st.integers(1, 30))):
            move = data.draw(st.sampled_from(["take", "copy", "give", "run"]))
            if move == "take":
                try:
                    slot = arena.acquire(data.draw(st.integers(1, 16 << 10)), time.monotonic())
                except ArenaBusy:  # what is free lies in pieces
                    continue
                held.append(slot)
                end = slot.offset + slot.nbytes
                below = [
                    event for other, event in into if slot.offset < other.offset + other.nbytes and other.offset < end
                ]
                assert {event for event in below if not event.done()} <= set(slot.copies)
                assert not any(copy.done() for copy in slot.copies)
            elif move == "copy" and held:
                number = data.draw(st.integers(0, len(held) - 1))
                into.append((held[number], event := Event()))
                held[number] = replace(held[number], copies=(*held[number].copies, event))
            elif move == "give" and held:
                arena.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
            elif move == "run" and into:
                into[data.draw(st.integers(0, len(into) - 1))][1]._ran.set()
    finally:
        for _, event in into:
            event._ran.set()
    for slot in held:
        arena.release(slot)
    assert arena.free_bytes() == arena.budget_bytes
    assert arena.acquire(64 << 10, time.monotonic()).copies == (), "copies that have run are forgotten"


@pytest.mark.parametrize("give", ["before", "after", "never"])
def test_memory_is_not_unmapped_under_a_copy(give: str) -> None:
    arena = Arena()
    arena.grow(8 << 10)
    assert arena.wait_prepared(PATIENCE_SECONDS)
    event, slot = Event(), arena.acquire(8 << 10)
    regions = arena._regions
    slot = StagingBuffer(0, slot.offset, slot.nbytes, slot.address, slot.view, copies=(event,))
    ended = threading.Event()

    def end() -> None:
        nonlocal arena
        if give == "before":
            arena.release(slot)
            arena.close()
        elif give == "after":
            arena.close()
            arena.release(slot)
        else:
            arena.release(slot)
            del arena
        ended.set()

    threading.Thread(target=end).start()
    assert ended.wait(0.2) == (give == "before"), "a device that hangs holds nobody up who closes"
    assert 0 in regions
    event._ran.set()
    assert ended.wait(PATIENCE_SECONDS)
    assert give == "never" or until(lambda: 0 not in regions), "the memory is never given back"


@pytest.mark.parametrize("give", ["before", "after", "never"])
def test_memory_of_a_copy_that_the_device_says_nothing_about_stays_mapped(
    give: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Captured(Event):
        def done(self) -> bool:
            raise RuntimeError("operation not permitted when stream is capturing")

        def wait(self) -> None:
            self.done()

    kept: list[Any] = []
    monkeypatch.setattr(arenas, "_never_unmapped", kept)
    arena = Arena()
    arena.grow(8 << 10)
    assert arena.wait_prepared(PATIENCE_SECONDS)
    slot = replace(arena.acquire(8 << 10), copies=(Captured(),))
    region = arena._regions[0]
    if give == "after":
        arena.close()
    arena.release(slot)
    if give == "before":
        arena.close()
    del arena
    gc.collect()
    assert until(lambda: kept == [region])


def test_a_save_whose_copies_training_cannot_wait_for_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would change what is being copied."""

    class Broken(Stream):
        def make_current_wait(self) -> None:
            raise RuntimeError("CUDA error: 700")

    stream = Broken()
    stream.open.set()
    monkeypatch.setattr(copy_streams.CopyStreams, "of", lambda *_: stream)
    with Checkpointer(tmp_path / "run") as run:
        pending = run.save(1, {"w": torch.zeros(1000)})
        assert isinstance(pending.exception(PATIENCE_SECONDS), SaveFailed)
        assert run.ls() == []


def test_a_device_that_fails_while_copies_are_queued_is_what_the_save_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the storage, which whoever writes would speak of."""

    class Broken(Stream):
        def enqueue(self, copy: Any, after: Any, queued: list[Any]) -> None:
            super().enqueue(copy, after, queued)
            queued[-1].wait = self.fail

        def fail(self) -> None:
            raise RuntimeError("CUDA error: 700")

    stream = Broken()
    stream.open.set()
    monkeypatch.setattr(copy_streams.CopyStreams, "of", lambda *_: stream)
    with Checkpointer(tmp_path / "run") as run:
        error = run.save(1, {"w": torch.zeros(1000)}).exception(PATIENCE_SECONDS)
        assert isinstance(error, SaveFailed)
        assert "copying the state failed: RuntimeError: CUDA error: 700" in str(error)
        assert "storage" not in str(error)


# -- a save that fails ends at once ------------------------------------------------------------------------------------


class Model:
    """Deferred: 24 MiB, of which none is copied before ``save`` returns."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(24)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.state = {"model": self.model}
        self.run = Checkpointer(path, **by_stage(writer=WriterOptions(durable_timeout_seconds=600), **options))
        let_all_be_deferred(self.run).watch(self.optimizer)
        self.run.prepare(self.state)
        self.run._arena.wait_prepared(PATIENCE_SECONDS)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, thread: str) -> None:
    """The next copy on a thread of that name raises; copies on others wait until then."""
    original, raised = staging.copy_segments, threading.Event()

    def copy(*args: Any) -> None:
        if threading.current_thread().name.startswith(thread):
            if not raised.is_set():
                raised.set()
                raise error
        else:
            raised.wait(PATIENCE_SECONDS)
        original(*args)

    monkeypatch.setattr(staging, "copy_segments", copy)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: 700"), MemoryError()])
def test_an_error_while_the_state_is_copied_in_the_background_fails_the_save_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    used = Model(tmp_path / "run")
    failing(monkeypatch, error, "asyncckpt-stager")
    pending = used.run.save(1, used.state)
    found = pending.exception(PATIENCE_SECONDS)
    assert isinstance(found, SaveFailed)
    assert found.__cause__ is error
    assert "copying the state failed" in str(found)
    used.optimizer.step()
    used.run.save(2, used.state).result(PATIENCE_SECONDS)
    used.run.close()
    assert [entry.step for entry in used.run.ls()] == [2]


def test_close_raises_what_went_wrong_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = Model(tmp_path / "run")
    failing(monkeypatch, torch.OutOfMemoryError("no memory"), "asyncckpt-stager")
    used.run.save(1, used.state)
    with pytest.raises(SaveFailed, match=r"OutOfMemoryError: no memory.*codec='none'"):
        used.run.close()


def test_the_thread_that_copies_lives_on_whatever_a_copy_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Model(tmp_path / "run")
    failing(monkeypatch, SystemExit(1), "asyncckpt-stager")
    assert isinstance(used.run.save(1, used.state).exception(PATIENCE_SECONDS), SaveAbandoned)
    used.run.save(2, used.state).result(PATIENCE_SECONDS)
    used.run.close()


@pytest.mark.parametrize("where", ["while it copies", "while another thread copies", "while it waits for memory"])
def test_an_interrupt_while_the_update_waits_fails_the_save_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    used = Model(tmp_path / "run", staging_bytes=1 << 20)
    gate = threading.Event()

    class Slow(PosixOps):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            gate.wait(PATIENCE_SECONDS)
            return super().pwrite(fd, data, offset)

    used.run._store.ops = Slow()
    if where == "while it copies":
        gate.set()
        failing(monkeypatch, KeyboardInterrupt(), "MainThread")
    elif where == "while another thread copies":
        waits = iter([True])
        original = threading.Event.wait

        def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
            (flight,) = used.run._in_flight.all() or [None]
            if flight is not None and self is flight.job._done and next(waits, False):
                raise KeyboardInterrupt
            return original(self, timeout)

        monkeypatch.setattr(staging.StagingJob, "run", lambda self, deadline=None: None)
        monkeypatch.setattr(threading.Event, "wait", interrupted)
    else:
        original_acquire = Arena.acquire

        def acquire(self: Arena, *args: Any) -> StagingBuffer:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return original_acquire(self, *args)

        monkeypatch.setattr(Arena, "acquire", acquire)
    pending = used.run.save(1, used.state)
    with pytest.raises(KeyboardInterrupt):
        used.optimizer.step()
    gate.set()
    found = pending.exception(PATIENCE_SECONDS)
    assert isinstance(found, SaveAbandoned)
    assert "interrupted while the state was being copied" in str(found)
    monkeypatch.undo()
    used.run.save(2, used.state)
    used.optimizer.step()
    used.run.close()
    assert [entry.step for entry in used.run.ls()] == [2]


def test_an_error_of_the_storage_still_ends_the_copying(tmp_path: Path) -> None:
    used = Model(tmp_path / "run", staging_bytes=1 << 20)

    class Full(PosixOps):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            raise OSError(errno.ENOSPC, "full")

    used.run._store.ops = Full()
    pending = used.run.save(1, used.state)
    assert isinstance(pending.exception(PATIENCE_SECONDS), NotEnoughSpace)
    assert pending.staged(PATIENCE_SECONDS)
    used.optimizer.step()
    used.run.close()


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attempt", range(4))
def test_on_a_gpu_copies_of_a_save_that_failed_do_not_land_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    """Half a second of kernels lies before the first one's copies, and nothing before the second one's. What is written
    is what lies in the staging memory once all copies have landed."""
    states = [{f"t{n}": torch.full((1 << 20,), value, device="cuda") for n in range(64)} for value in (1.0, 2.0)]
    run = Checkpointer(tmp_path / "run", writer=WriterOptions(reuse_unchanged=False))
    run.save(1, states[0]).result(60)
    run.wait()
    queued = threading.Event()
    run._store.ops = ops = Landed(queued.is_set)
    torch.cuda.synchronize()
    ops.full = True
    original = copy_streams._StreamCopies.enqueue

    def enqueue(*args: Any) -> None:
        original(*args)
        queued.set()
        until_it_failed(run)

    with monkeypatch.context() as patch, torch.cuda.stream(torch.cuda.Stream()):
        patch.setattr(copy_streams._StreamCopies, "enqueue", enqueue)
        torch.cuda._sleep(900_000_000)
        failed = run.save(2, states[0])
    assert isinstance(failed.exception(60), NotEnoughSpace)
    ops.full = False
    pending = run.save(3, states[1])
    time.sleep(0.2)  # if nobody waits, it has been copied and digested by now
    torch.cuda.synchronize()
    ops.landed.set()
    pending.result(60)
    assert run.verify(3) == [], "acknowledged and damaged"
    found = run.load_tensors(3)
    assert all(torch.equal(found[f"{name}.value"], tensor.cpu()) for name, tensor in states[1].items())
    run.close()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_saves_take_no_more_and_more_device_memory(tmp_path: Path) -> None:
    """Each save had a stream of its own, and the allocator a cache for each."""
    state = {"w": torch.randn(2880, 2880, device="cuda").t()}
    reserved = []
    with Checkpointer(
        tmp_path / "run", writer=WriterOptions(reuse_unchanged=False), run=RunOptions(overwrite=True)
    ) as run:
        for _ in range(40):
            run.save(1, state).result(60)
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1], reserved


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_without_memory_for_the_planes_fails_the_save_at_once(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False, device="cuda") for _ in range(16)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run", files=Safetensors(codec="planes", extent_bytes=64 << 20)) as run:
        run.watch(optimizer)
        run.prepare({"model": model})
        assert run._arena.wait_prepared(60)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            found = run.save(1, {"model": model}).exception(30)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert isinstance(found, SaveFailed)
        assert isinstance(found.__cause__, torch.OutOfMemoryError)
        run.save(2, {"model": model}).result(60)
        assert run.verify(2) == []
