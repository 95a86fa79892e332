"""A signal that comes inside a call breaks nothing: no lock stays held, no step stays reserved, and it is acted on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, Preempted, Preemption, SaveAbandoned, StagingOptions, interrupts
from asyncckpt.events import Event
from asyncckpt.testing import GatedOps

STATE = {"w": torch.arange(1000.0)}


@pytest.fixture(autouse=True)
def the_usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_waits_until_the_body_has_ended() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("after the signal")
    assert seen == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_wait_is_where_it_is_acted_on() -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        interrupts.wait_for(threading.Event().wait, 30)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_insists_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "IMPATIENCE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("hung in a call of the program's own, it would never end")


def test_a_handler_that_returns_is_called_once_and_stays() -> None:
    came: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with interrupts.deferred(), interrupts.deferred():
            os.kill(os.getpid(), signal.SIGUSR2)
            assert came == []
        assert came == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is handler
    finally:
        signal.signal(signal.SIGUSR2, before)


def _interrupted_at(number: int, run: Checkpointer, step: int) -> bool:
    """Save, with Ctrl-C at the ``number``-th line of this library that the training thread comes to. Returns whether it
    came so far."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if "/asyncckpt/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        run.save(step, STATE)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left <= 0


def _instants(path: Path, every: int, most: int) -> int:
    tried = 0
    with Checkpointer(path, staging=StagingOptions(budget_bytes=1 << 20, stall_timeout_seconds=20)) as run:
        run.save(0, STATE).result(20)
        for number in range(1, most, every):
            came = _interrupted_at(number, run, 2 * number)
            with contextlib.suppress(SaveAbandoned):  # it came while the state was copied
                assert run.wait(20), f"hung after Ctrl-C at line {number}"
            run.save(2 * number + 1, STATE).result(20)
            tried += 1
            if not came:
                break
    return tried


def test_ctrl_c_at_some_lines_of_a_save_costs_no_later_one(tmp_path: Path) -> None:
    assert _instants(tmp_path / "run", every=61, most=1200) > 5


@pytest.mark.slow
def test_ctrl_c_at_any_line_of_a_save_costs_no_later_one(tmp_path: Path) -> None:
    assert _instants(tmp_path / "run", every=1, most=5000) > 300


def test_ctrl_c_while_a_save_waits_for_earlier_ones_is_acted_on_at_once(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", staging=StagingOptions(max_in_flight=1)) as run:
        ops = run._store.ops = GatedOps()
        run.save(1, STATE)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run.save(2, STATE)
        assert time.monotonic() - began < 10
        ops.gate.set()
        run.save(2, STATE).result(20)


def test_handlers_that_were_there_before_are_called_too(tmp_path: Path) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: called.append(number))
    try:
        own = signal.getsignal(signal.SIGUSR1)
        outer = Checkpointer(tmp_path / "outer", preemption=Preemption((signal.SIGUSR1,)))
        with pytest.raises(Preempted), Checkpointer(tmp_path / "run", preemption=Preemption((signal.SIGUSR1,))) as run:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert called == [signal.SIGUSR1]
            run.step(1, STATE)
        with pytest.raises(Preempted):
            outer.step(1, STATE)
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("first", [0, 1])
def test_in_whatever_order_two_are_closed_the_handlers_before_them_are_back(first: int, tmp_path: Path) -> None:
    own = signal.getsignal(signal.SIGUSR1)
    runs = [Checkpointer(tmp_path / str(n), preemption=Preemption((signal.SIGUSR1,))) for n in range(2)]
    runs[first].close()
    runs[1 - first].close()
    assert signal.getsignal(signal.SIGUSR1) == own


def test_preemption_past_its_deadline_leaves_with_its_code_and_publishes_nothing_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []
    preemption = Preemption((signal.SIGUSR1,), deadline_seconds=0.3)
    with pytest.raises(Preempted) as caught, Checkpointer(tmp_path / "run", preemption=preemption) as run:
        run.events.subscribe(events.append)
        run.save(1, STATE)
        assert run.wait(20)
        ops = run._store.ops = GatedOps()
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)
        run.step(2, {"w": STATE["w"] + 1})  # what is unchanged would be linked, and not written
    assert time.monotonic() - began < 25, "it waited for the storage, not for its deadline"
    assert (caught.value.code, caught.value.step, caught.value.durable) == (128 + signal.SIGUSR1, 2, False)
    assert "step 2 is not durable 0 s after SIGUSR1, and is given up" in caplog.text
    ops.gate.set()
    time.sleep(0.3)
    assert [entry.step for entry in run.ls()] == [1], "published after it was given up"


def test_preemption_leaves_at_its_deadline_where_the_save_is_durable_and_tidying_up_hangs(tmp_path: Path) -> None:
    preemption = Preemption((signal.SIGUSR1,), deadline_seconds=2.0)
    with pytest.raises(Preempted) as caught, Checkpointer(tmp_path / "run", preemption=preemption) as run:
        run.save(1, STATE)
        assert run.wait(20)
        ops = run._store.ops = GatedOps()
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)
        run.step(2, STATE)  # linked to step 1 as a whole; the gate holds the pointer to the latest one
    assert time.monotonic() - began < 25, "it waited for the storage, not for its deadline"
    assert caught.value.durable
    ops.gate.set()
    assert [entry.step for entry in run.ls()] == [1, 2]
