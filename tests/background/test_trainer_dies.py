"""A trainer that is killed still gets published what it had staged, and nothing of what it had not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.background import ForkedTrainer, background_pids, only_pid, stop, until

from asyncckpt import (
    Checkpointer,
    LeaseOptions,
    Run,
    RunLocked,
    RunOptions,
    Safetensors,
    StagingOptions,
    WriterOptions,
)

ALWAYS = WriterOptions(process="always")


def _state(step: int) -> dict[str, Any]:
    return {"w": torch.full((500_000,), float(step)), "b": torch.arange(7) + step, "meta": {"step": step}}


def _empty() -> dict[str, Any]:
    return {"w": torch.zeros(500_000), "b": torch.zeros(7, dtype=torch.int64), "meta": {"step": 0}}


def _hidden(path: Path) -> list[str]:
    """What a run directory has besides checkpoints and the records that belong to every run."""
    return [one for one in os.listdir(path) if one.startswith((".tmp", ".trash"))]


def _stages(path: Path, steps: int, **options: Any) -> Callable[[Callable[[str], None]], None]:
    """A trainer that saves durably once, has its background process stopped by the test, and saves so many steps."""

    def body(say: Callable[[str], None]) -> None:
        run = Checkpointer(path, writer=ALWAYS, **options)
        run.save(1, _state(1)).result()
        say("saved")
        while not os.path.exists(f"{path}.go"):
            threading.Event().wait(0.005)
        for step in range(2, steps + 2):
            pending = run.save(step, _state(step))
            say(f"saving {step}")
            pending.staged()
            say(f"staged {step}")
        threading.Event().wait()

    return body


@pytest.mark.parametrize("steps", [1, 2])
def test_what_was_staged_is_published_and_the_next_run_waits_for_it(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "run"
    with ForkedTrainer(_stages(path, steps, staging=StagingOptions(max_in_flight=3, budget_bytes=16 << 20))) as trainer:
        assert trainer.hear() == "saved"
        process = only_pid(trainer.pid)
        stop(process)
        Path(f"{path}.go").touch()
        for step in range(2, steps + 2):
            assert trainer.hear() == f"saving {step}"
            assert trainer.hear() == f"staged {step}"
        assert trainer.end(signal.SIGKILL) == -signal.SIGKILL
    assert [entry.step for entry in Run(path).ls()] == [1]
    state, found = _empty(), []

    def resume() -> None:
        with Checkpointer(path, writer=ALWAYS) as run:
            found.append(run.resume(state))

    resuming = threading.Thread(target=resume)
    resuming.start()
    resuming.join(0.5)
    assert resuming.is_alive(), "it began while the last run's process still had the directory"
    os.kill(process, signal.SIGCONT)
    resuming.join(30)
    assert found == [steps + 1]
    assert torch.equal(state["w"], _state(steps + 1)["w"])
    assert state["meta"] == {"step": steps + 1}
    until(lambda: not background_pids(trainer.pid))
    assert [entry.step for entry in Run(path).ls()] == list(range(1, steps + 2))
    assert [problem for step in range(1, steps + 2) for problem in Run(path).verify(step)] == []
    assert _hidden(path) == []


def test_the_next_run_waits_no_longer_than_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with ForkedTrainer(_stages(path, 1)) as trainer:
        assert trainer.hear() == "saved"
        process = only_pid(trainer.pid)
        stop(process)
        trainer.end(signal.SIGKILL)
    try:
        lease = LeaseOptions(finish_seconds=0.1)
        with pytest.raises(RunLocked), Checkpointer(path, run=RunOptions(lease=lease)) as run:
            run.resume(_empty())
    finally:
        os.kill(process, signal.SIGCONT)
    until(lambda: not background_pids(trainer.pid))


def test_what_was_not_all_staged_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with ForkedTrainer(
        _stages(path, 1, staging=StagingOptions(budget_bytes=1 << 20), files=Safetensors(extent_bytes=256 << 10))
    ) as trainer:
        assert trainer.hear() == "saved"
        process = only_pid(trainer.pid)
        stop(process)  # it writes nothing, so that no memory comes free
        Path(f"{path}.go").touch()
        threading.Event().wait(0.3)
        trainer.end(signal.SIGKILL)
        os.kill(process, signal.SIGCONT)
        until(lambda: not background_pids(trainer.pid))
    assert [entry.step for entry in Run(path).ls()] == [1]
    assert _hidden(path) == []
    with Checkpointer(path) as run:
        state = _empty()
        assert run.resume(state) == 1
        assert torch.equal(state["w"], _state(1)["w"])
        run.save(2, _state(2)).result()
