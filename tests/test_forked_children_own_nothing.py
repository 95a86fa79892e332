"""What a forked child has copies of, its parent's saves, files, locks and memory, stays its parent's."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_children import PATIENCE_SECONDS, STATE, gated_save, held, in_child, locks_of

from asyncckpt import Checkpointer, CheckpointerClosed, KeepLast, RunLocked
from asyncckpt.integrations.chrome_trace import ChromeTrace
from asyncckpt.integrations.dcp import Writer
from asyncckpt.memory.arena import Arena
from asyncckpt.storage.lease import LOCK_FILE, Lease, read_holder
from asyncckpt.types import LeaseOptions


def open_below(path: Path) -> list[str]:
    """The files below ``path`` that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [target for target in found if target.startswith(f"{path}/")]


def test_a_child_that_closes_gives_nothing_of_its_parents_away(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    run.save(1, STATE).result()
    lease = run._held.hold
    assert lease is not None

    def child() -> None:
        run.close()
        lease.release()
        other = Checkpointer(run.path)
        with pytest.raises(RunLocked):
            other.save(2, STATE)
        other.close()

    in_child(child)
    holder = read_holder(run.path)
    assert holder is not None
    assert not holder.released
    lease.check()
    run.save(2, STATE).result()
    run.close()


def test_calls_of_a_child_say_whose_checkpointer_it_is(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    run = Checkpointer(tmp_path / "run", every=1)
    run.watch(optimizer)
    run.save(1, state).result()
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: run.save(2, state),
        "step": lambda: run.step(2, state),
        "prepare": lambda: run.prepare(state),
        "resume": lambda: run.resume(state),
        "restore": lambda: run.restore(state),
        "watch": lambda: run.watch(optimizer),
        "wait": run.wait,
        "prune": run.prune,
        "look what would be pruned": lambda: run.prune(dry_run=True),
    }

    def child() -> None:
        for name, call in calls.items():
            with pytest.raises(CheckpointerClosed, match=f"made in process {os.getppid()}"):
                call()
                raise AssertionError(f"{name} was done in a child")
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        with run.guard():
            model.weight.data.zero_()
        assert [entry.step for entry in run.ls()] == [1]
        assert run.verify(1) == []

    with held(*locks_of(run)):
        in_child(child)
    run.save(2, state).result()
    run.close()


def test_a_child_does_not_wait_for_a_save_that_its_parent_makes(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    durable = run.save(1, STATE)
    report = durable.result()
    ops, pending = gated_save(run, STATE)

    def child() -> None:
        async def awaited() -> object:
            return await pending

        for wait in (pending.result, lambda: asyncio.run(awaited())):
            with pytest.raises(CheckpointerClosed, match="step 2"):
                wait()
        assert isinstance(pending.exception(), CheckpointerClosed)
        assert pending.staged()
        assert pending.failed()
        assert durable.result() == report

    (flight,) = run._in_flight.all()
    locks = [future._condition for future in (pending._future, durable._future)]
    with held(*locks, flight.job._done._cond):
        in_child(lambda: (child(), in_child(child)))
    ops.gate.set()
    assert pending.result(60).step == 2
    run.close()


def test_a_child_holds_no_file_of_a_save_and_no_lock(tmp_path: Path) -> None:
    """A worker that lives for long would keep a killed trainer's directory locked, a checkpoint that was being compared
    with from being deleted, and the blocks of deleted files taken."""
    run = Checkpointer(tmp_path / "run", keep=KeepLast(1))
    run.save(1, STATE | {"still": torch.ones(5000)}).result()
    opened = run.open(1)
    ops, pending = gated_save(run, {"w": STATE["w"] + 1, "still": torch.ones(5000)})
    patience = time.monotonic() + PATIENCE_SECONDS
    linked = (tmp_path / "run").glob

    def ready() -> bool:  # a file that is being taken over is open for a moment
        large = [name for name in open_below(tmp_path) if name.endswith(".safetensors")]
        return bool(list(linked(".tmp-*/still-*")) and large) and not any("still-" in name for name in large)

    while not ready() and time.monotonic() < patience:
        time.sleep(0.01)
    before = open_below(tmp_path)
    assert any(name.endswith(".safetensors") for name in before)
    assert sum("step-00000001" in name for name in before) > 2, "the save has it open, too"

    def child() -> None:
        found = [os.path.relpath(name, tmp_path / "run") for name in open_below(tmp_path)]
        large = [name for name in found if not (name.startswith(".tmp-") and name.endswith(".json"))]
        assert sorted(large) == ["step-00000001", "step-00000001/manifest.json"]
        assert opened.reader.read_small("manifest.json", 1 << 20), "what the user opened stays open"

    in_child(child)
    ops.gate.set()
    pending.result(60)
    opened.close()
    run.close()


def test_a_child_does_not_have_the_lock_of_a_directory_that_is_being_taken(tmp_path: Path) -> None:
    record = '{"owner": "abc", "host": "node7", "boot": "node7:x", "pid": 4, "beat": 1, "released": false}'
    (tmp_path / ".asyncckpt-lease.json").write_text(record)
    leases: list[Lease] = []

    def take() -> None:
        leases.append(Lease.acquire(str(tmp_path), options=LeaseOptions(ttl_seconds=3.0)))

    taking = threading.Thread(target=take)
    taking.start()
    patience = time.monotonic() + PATIENCE_SECONDS
    while str(tmp_path / LOCK_FILE) not in open_below(tmp_path) and time.monotonic() < patience:
        time.sleep(0.01)
    assert str(tmp_path / LOCK_FILE) in open_below(tmp_path)

    def child() -> None:
        assert str(tmp_path / LOCK_FILE) not in open_below(tmp_path)

    in_child(child)
    taking.join()
    leases[0].check()
    in_child(child)
    leases[0].release()


def test_a_child_unmaps_nothing_that_lies_where_its_parents_staging_memory_was(tmp_path: Path) -> None:
    arena = Arena()
    arena.grow(4 << 20)
    assert arena.wait_prepared(20)
    slot = arena.acquire(4096)
    address, nbytes = slot.address, slot.nbytes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    things: list[Any] = [arena, slot]
    del arena, slot

    def child() -> None:
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        assert libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == address
        ctypes.memset(address, 7, nbytes)
        things.clear()
        gc.collect()
        assert ctypes.string_at(address, nbytes) == b"\7" * nbytes  # or the child dies of SIGSEGV

    in_child(child)
    things.clear()


def test_a_child_takes_no_pinned_memory_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        calls: list[str]

        def __init__(self) -> None:
            self.calls = []

        def cudaHostRegister(self, *_: int) -> int:
            self.calls.append("register")
            return 0

        def cudaHostUnregister(self, _: int) -> None:
            self.calls.append("unregister")

    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    arena = Arena()
    arena.grow(1 << 20, pin=torch.device("cuda", 0))
    assert arena.wait_prepared(20)

    def child() -> None:
        arena._regions.clear()
        gc.collect()
        assert driver.calls == ["register"]

    in_child(child)
    arena.close()
    assert driver.calls == ["register", "unregister"]


def test_a_child_that_ends_a_writer_of_dcp_leaves_its_parents_save_alone(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", step=1)
    directory = writer._live.begin(str(tmp_path / "run"), "step-00000001", 1, overwrite=False)
    in_child(writer.close)
    assert os.path.isdir(directory.path)
    assert writer._live.hold is not None
    writer._live.hold.check()
    writer.close()
    assert not os.path.isdir(directory.path)


def test_a_child_does_not_write_its_parents_trace(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")
    with held(trace._lock):
        in_child(trace.close)
    assert not os.path.exists(tmp_path / "trace.json")
    trace.close()
    assert os.path.exists(tmp_path / "trace.json")


def test_a_child_forked_while_the_lock_file_is_opened_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it lets other threads run before this one knows the descriptor."""
    real, forked = os.open, threading.Event()

    def child() -> None:
        assert str(tmp_path / LOCK_FILE) not in open_below(tmp_path)

    def opened(path: str, *args: Any, **more: Any) -> int:
        fd = real(path, *args, **more)
        if str(path).endswith(LOCK_FILE) and not forked.is_set():
            forked.set()
            in_child(child)
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        lease = Lease.acquire(str(tmp_path))
    assert forked.is_set()
    lease.check()
    lease.release()
