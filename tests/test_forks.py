"""A forked child has a copy of everything and acts on nothing: it ends at once, and its parent goes on."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_children import STATE, gated_save, held, in_child, locks_of
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt import Checkpointer, KeepLast, Preemption, Run, forks

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
from support.forked_children import STATE, held, locks_of
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
