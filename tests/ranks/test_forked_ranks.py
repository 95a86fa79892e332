"""What ranks fork is no rank of their job: it ends at once, takes nothing from it, and may save by itself."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from torch.utils.data import DataLoader, TensorDataset

import asyncckpt
from asyncckpt.state.dtensor import job_size

#: A farewell to ranks that do not answer takes five seconds, and everything else a fraction of one.
_BOUND_SECONDS = 3.0


def _state() -> dict[str, Any]:
    return {"w": torch.arange(200_000, dtype=torch.float32)}


def _child(what: Any, *args: Any) -> tuple[float, int | None]:
    """Seconds that a forked child takes, and its exit code."""
    began = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=what, args=args)
    child.start()
    child.join(20)
    return time.monotonic() - began, child.exitcode


def _nothing() -> None:
    pass


def _alone(run: asyncckpt.Checkpointer, path: str) -> None:
    run.close()
    with pytest.raises(asyncckpt.CheckpointerClosed):
        run.restore(_state())
    assert job_size() == 1
    with asyncckpt.Checkpointer(path) as own:
        own.save(1, _state()).result(20)
    asyncckpt.Run(path).restore(_state())


def _epoch() -> None:
    for _ in DataLoader(TensorDataset(torch.randn(8, 1)), num_workers=2, batch_size=4):
        pass


def _forks(me: Me, path: str) -> dict[str, tuple[float, int | None]]:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    _epoch()  # the first in a process takes seconds, of torch's own
    with asyncckpt.Checkpointer(os.path.join(path, "run"), ranks=TIMEOUT) as run:
        run.save(1, _state()).result(30)
        found = {
            "nothing": _child(_nothing),
            "alone": _child(_alone, run, os.path.join(path, f"alone-{me.rank}")),
        }
        began = time.monotonic()
        _epoch()
        found["loader"] = time.monotonic() - began, 0
        run.save(2, _state()).result(30)
        state = {"w": torch.zeros(200_000)}
        assert run.restore(state).step == 2
        assert torch.equal(state["w"], _state()["w"])
    return found


def test_what_a_rank_forks_costs_nothing_and_is_no_rank(crews: Crews, tmp_path: Path) -> None:
    for found in crews(2).values(_forks, str(tmp_path), timeout=90):
        for what, (seconds, code) in found.items():
            assert code == 0, what
            assert seconds < _BOUND_SECONDS, what
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [1, 2]
    for rank in (0, 1):
        assert asyncckpt.Run(tmp_path / f"alone-{rank}").verify() == []
