"""A forked child has a copy of everything and acts on nothing: it ends at once, and its parent goes on."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt import Checkpointer, CheckpointerClosed, KeepLast, PendingSave, Preemption, Run, RunLocked, forks
from asyncckpt.integrations.chrome_trace import ChromeTrace
from asyncckpt.integrations.dcp import Writer
from asyncckpt.memory.arena import Arena
from asyncckpt.storage.lease import LOCK_FILE, Lease, read_holder
from asyncckpt.testing import GatedOps
from asyncckpt.types import LeaseOptions

STATE = {"w": torch.arange(300_000, dtype=torch.float32)}
#: A child ends within milliseconds, or never; a machine may be busy.
PATIENCE_SECONDS = 20.0


def in_child(what: Callable[[], object]) -> None:
    """Run ``what`` in a child that multiprocessing forks, and which ends as its children do. Fails where it raises or
    does not end."""

    def body() -> None:
        try:
            what()
        except BaseException as error:
            said.send(repr(error))
            raise
        said.send("")

    hears, said = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(PATIENCE_SECONDS)
    ended = not child.is_alive()
    if not ended:
        child.kill()
        child.join()
    assert (hears.recv() if hears.poll() else "it said nothing") == ""
    assert ended, "the child did not end"
    assert child.exitcode == 0
    said.close()
    hears.close()


@contextlib.contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Another thread holds these, as a writer or a committer may at any moment, and will never let go in a child."""
    has, done = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            has.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def locks_of(run: Checkpointer) -> list[Any]:
    """Every lock that a thread of a checkpointer may hold while another one forks."""
    lease = run._held.hold
    assert lease is not None
    pools = run._builder.pools
    return [
        run._arena._changed,
        run._committer._lock,
        run._in_flight._changed,
        run._quarantine._lock,
        run._reuse._lock,
        run._committer._retention_lock,
        *(pool._lock for pool in (pools.writing, pools.small, pools.encoding, run._committer._pool)),
        *(pool._start_lock for pool in (pools.writing, pools.small, pools.encoding, run._committer._pool)),
        run._builder._encoder._changed,
        lease._stop._cond,
        lease._write_lock,
        run._steps._lock,
    ]


def gated_save(run: Checkpointer, state: dict[str, Any]) -> tuple[GatedOps, PendingSave]:
    """Step 2, which is not written before the operations' gate is opened."""
    run.wait()
    tidied = threading.Event()
    run._committer._pool.submit(tidied.set)
    assert tidied.wait(PATIENCE_SECONDS)
    run._store.ops = ops = GatedOps()
    return ops, run.save(2, state)


def open_below(path: Path) -> list[str]:
    """The files below ``path`` that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [target for target in found if target.startswith(f"{path}/")]


# -- the end of a child ------------------------------------------------------------------------------------------------


def test_a_child_ends_although_threads_held_every_lock_when_it_was_forked(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    run.save(1, STATE).result()
    ops, pending = gated_save(run, STATE)
    (flight,) = run._in_flight.all()
    locks = [pending._future._condition, flight.job._done._cond, flight.job._lock, flight.save.scope._changed]

    def child() -> None:
        assert run.unfinished() == 0
        with run:
            pass
        run.close()

    with held(*locks_of(run), *locks):
        in_child(lambda: None)
        in_child(child)
    ops.gate.set()
    pending.result(60)
    run.close()


def test_a_child_of_a_child_ends_too(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, STATE).result()
        with held(*locks_of(run)):
            in_child(lambda: in_child(run.close))
        run.save(2, STATE).result()


INTERPRETER = """
import gc, os, sys, threading, time, torch, asyncckpt
sys.path.insert(0, sys.argv[2])
from test_forks import STATE, held, locks_of
def ended(pid):
    patience = time.monotonic() + 20
    while time.monotonic() < patience:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "never"
run = asyncckpt.Checkpointer(sys.argv[1], preemption=asyncckpt.Preemption())
run.save(1, STATE).result()
codes = []
with held(*locks_of(run)):
    for leave in (sys.exit, os._exit):
        for dropped in (False, True):
            pid = os.fork()
            if not pid:
                if dropped:
                    del run
                    gc.collect()
                leave(3)
            codes.append(ended(pid))
run.save(2, STATE)  # the drain is the parent's
print(codes, flush=True)
"""


def test_a_forked_interpreter_ends_by_whichever_way_it_goes(tmp_path: Path) -> None:
    """Through the exit drain and the finalizers, of a checkpointer that is there and of one that is dropped first."""
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETER, str(tmp_path / "run"), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[3, 3, 3, 3]\n", done.stderr
    assert done.returncode == 0, done.stderr
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [1, 2]


def test_what_is_to_happen_when_an_object_goes_does_not_happen_in_a_child() -> None:
    called: list[int] = []
    things = [type("Thing", (), {})() for _ in range(2)]
    for thing in things:
        forks.finalize(thing, called.append, 1)
    del thing

    def child() -> None:
        things.clear()
        gc.collect()
        assert called == []

    in_child(child)
    del things[0]
    assert called == [1]


def test_a_data_loader_with_workers_costs_a_run_nothing(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "run", keep=KeepLast(2), preemption=Preemption()) as run:
        run.watch(optimizer)
        for step in (1, 2, 3):
            run.save(step, state)
            loader = DataLoader(TensorDataset(torch.randn(8, 300)), num_workers=2, batch_size=4)
            for (batch,) in loader:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
        run.wait()
        assert run.verify(3) == []
    assert len(Run(tmp_path / "run").ls()) == 2


# -- what is the parent's ----------------------------------------------------------------------------------------------


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
    while not any(name.endswith(".safetensors") for name in open_below(tmp_path)) and time.monotonic() < patience:
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
    arena = Arena()
    arena.grow(1 << 20, pin=True)
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


# -- a child of its own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left to the exit"])
def test_a_child_may_save_somewhere_by_itself(closed: bool, tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run", preemption=Preemption())
    run.save(1, STATE).result()
    kept: list[Checkpointer] = []

    def child(path: Path) -> None:
        own = Checkpointer(path)
        kept.append(own)
        own.save(1, STATE).result()
        own.save(2, STATE)
        if closed:
            own.close()

    in_child(lambda: (child(tmp_path / "child"), in_child(lambda: child(tmp_path / "grandchild"))))
    for name in ("child", "grandchild"):
        assert [entry.step for entry in Run(tmp_path / name).ls()] == [1, 2]
        assert Run(tmp_path / name).verify(2) == []
    run.save(2, STATE).result()
    run.close()


# -- signals -----------------------------------------------------------------------------------------------------------


def _signalled(number: signal.Signals, deeper: bool = False) -> int:
    """How a child that is sent this signal ends; 7 where it does not."""

    def child() -> None:
        if deeper:
            os._exit(_signalled(number) & 0xFF)
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        os._exit(7)

    pid = os.fork()
    if not pid:
        child()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def previous() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def _exits(_number: int, _frame: object) -> None:
    os._exit(5)


@pytest.mark.usefixtures("previous")
@pytest.mark.parametrize("checkpointers", [1, 2])
def test_a_signal_does_in_a_child_what_it_did_before(checkpointers: int, tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR1, _exits)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runs = [Checkpointer(tmp_path / str(number), preemption=Preemption()) for number in range(checkpointers)]
    assert _signalled(signal.SIGTERM) == -signal.SIGTERM
    assert _signalled(signal.SIGTERM, deeper=True) == -signal.SIGTERM & 0xFF
    assert _signalled(signal.SIGUSR1) == 5

    def child() -> None:
        assert signal.getsignal(signal.SIGUSR1) is _exits
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    in_child(child)
    watches = [run._triggers.signals for run in runs]
    assert not any(watch.received for watch in watches if watch is not None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert watches[-1] is not None
    assert watches[-1].received is signal.SIGTERM, "the parent's is still in place"
    for run in reversed(runs):
        run.close()
    assert signal.getsignal(signal.SIGUSR1) is _exits


@pytest.mark.usefixtures("previous")
def test_a_handler_of_the_users_own_in_a_child_comes_to_the_one_before(tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Checkpointer(tmp_path / "run", preemption=Preemption()):
        ours: Any = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *args: ours(*args) or None)
        assert _signalled(signal.SIGTERM) == -signal.SIGTERM
        signal.signal(signal.SIGTERM, ours)
