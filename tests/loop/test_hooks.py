"""Preemption: a signal leads to one durable save within the deadline and a clean way out."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import Script
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from asyncckpt import Checkpointer, InvalidOption, Preempted, Preemption, Run, StagingOptions
from asyncckpt.events import Event, Preempting

TRAINER = """
import sys, time, torch, asyncckpt
model = torch.nn.Linear(50, 50); optimizer = torch.optim.AdamW(model.parameters())
state = {"model": model, "optimizer": optimizer}
ckpt = asyncckpt.Checkpointer(sys.argv[1], every=1000, preemption=asyncckpt.Preemption(deadline_seconds=20))
ckpt.watch(optimizer)
start = ckpt.resume(state)
with ckpt:
    for step in range(start, 1_000_000):
        model(torch.ones(1, 50)).sum().backward(); optimizer.step()
        ckpt.step(step + 1, state)
        if step == start:
            print("training", step, flush=True)
        time.sleep(0.001)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_its_code(number: signal.Signals, tmp_path: Path) -> None:
    last = 0
    for _ in range(2):  # killed, resumed, killed again
        with Script(TRAINER, tmp_path / "run") as child:
            assert child.stdout.readline() == f"training {last}\n"
            child.send_signal(number)
            status, _, errors = child.finish()
        assert status == 128 + number, errors
        entries = Run(tmp_path / "run").ls()
        assert entries[-1].step > last
        last = entries[-1].step
        assert Run(tmp_path / "run").verify(last) == []


def test_a_step_that_is_saved_already_is_only_waited_for(tmp_path: Path) -> None:
    events: list[Event] = []
    state = {"w": torch.zeros(3)}
    previous = signal.getsignal(signal.SIGUSR1)
    run = Checkpointer(tmp_path / "run", every=1, on_event=events.append, preemption=Preemption((signal.SIGUSR1,)))
    with pytest.raises(Preempted) as caught, run:
        run.step(1, state)
        os.kill(os.getpid(), signal.SIGUSR1)
        run.step(1, state)
    assert caught.value.code == 128 + signal.SIGUSR1
    assert caught.value.step == 1
    assert [entry.step for entry in run.ls()] == [1]
    assert [event.signal for event in events if isinstance(event, Preempting)] == ["SIGUSR1"]
    assert signal.getsignal(signal.SIGUSR1) == previous, "the handler was not given back"


def test_an_exit_code_of_ones_own(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run", preemption=Preemption((signal.SIGUSR1,), exit_code=0))
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Preempted) as caught, run:
        run.step(1, {"w": torch.zeros(3)})
    assert caught.value.code == 0


def test_signals_need_the_main_thread(tmp_path: Path) -> None:
    errors: list[Any] = []

    def make() -> None:
        try:
            Checkpointer(tmp_path / "run", preemption=Preemption())
        except InvalidOption as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_watch_takes_optimizers_only(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="Linear"):
        Checkpointer(tmp_path / "run").watch(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_hooks_are_taken_off_when_it_is_closed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Checkpointer(tmp_path / "run")
    run.watch(optimizer, optimizer)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(_global_optimizer_pre_hooks) == 1
    run.close()
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not _global_optimizer_pre_hooks


def test_hooks_go_with_a_checkpointer_that_is_only_dropped(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Checkpointer(tmp_path / "run")
    run.watch(optimizer)
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None
    optimizer.step()
    with Checkpointer(tmp_path / "other") as other:
        other.watch(optimizer)
        assert len(_global_optimizer_pre_hooks) == 1, "the other's alone"
    assert not _global_optimizer_pre_hooks


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deferred", [False, True])
def test_cuda_state_is_what_it_was_at_save_although_the_next_update_is_already_queued(
    deferred: bool, tmp_path: Path
) -> None:
    model = nn.Linear(4096, 4096, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "run", staging=StagingOptions(budget_bytes=64 << 20)) as run:
        if deferred:
            run.watch(optimizer)
        expected = {}
        for step in range(1, 4):
            optimizer.zero_grad()
            model(torch.randn(64, 4096, device="cuda")).square().mean().backward()
            optimizer.step()
            run.save(step, state)
            expected[step] = model.weight.detach().cpu().clone()
        run.wait()
        for step, weight in expected.items():
            assert torch.equal(run.load_tensors(step, ["model.weight"])["model.weight"], weight)
            fresh = nn.Linear(4096, 4096, device="cuda")
            run.restore({"model": fresh}, step)
            assert torch.equal(fresh.weight.cpu(), weight)
