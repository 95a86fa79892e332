"""What cannot be done is refused at the call, with what to do instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.options import by_stage

import asyncckpt
from asyncckpt import (
    Checkpointer,
    CheckpointNotFound,
    InvalidOption,
    InvalidStep,
    LeaseLost,
    Run,
    RunLocked,
    RunOptions,
    StepExists,
)

STATE = {"w": torch.arange(1000.0), "meta": {"a": 1}}


@pytest.mark.parametrize("step", [-1, 1.0, float("nan"), True, None, "3"])
def test_a_step_that_is_no_step_is_refused(step: Any, run: Checkpointer) -> None:
    with pytest.raises(InvalidStep, match="whole number"):
        run.save(step, STATE)


def test_a_step_saved_twice_or_going_backwards_says_what_to_do(run: Checkpointer) -> None:
    run.save(5, STATE).result()
    with pytest.raises(StepExists, match=r"step 5 is already saved as step-00000005.*overwrite=True"):
        run.save(5, STATE)
    with pytest.raises(InvalidStep, match=r"step 4 goes backwards, the newest is 5.*resume\(\)"):
        run.save(4, STATE)
    run.save(6, STATE).result()


def test_a_forgotten_resume_is_refused_instead_of_starting_over(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(100, STATE).result()
    with Checkpointer(tmp_path / "run", every=1) as run:
        with pytest.raises(InvalidStep, match="goes backwards, the newest is 100"):
            run.step(1, STATE)
        assert run.resume(dict(STATE)) == 100
        assert run.step(101, STATE) is not None


@pytest.mark.parametrize(
    "options",
    [
        {"name": "no-step"},
        {"name": "../{step}"},
        {"name": ".{step}"},
        {"name": "{step"},
        {"name": "{step.__class__}"},
        {"on_busy": "hope"},
        {"max_in_flight": 0},
        {"staging_bytes": 10},
        {"shard_bytes": 0},
        {"extent_bytes": 1000},
        {"every": "often"},
        {"keep": "all"},
        {"digest": "md5"},
        {"format": "pickle"},
        {"config": {"model": torch.zeros(1)}},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_early(options: Any, tmp_path: Path) -> None:
    with pytest.raises((InvalidOption, asyncckpt.UnknownName)):
        run = Checkpointer(tmp_path / "run", **by_stage(**options))
        run.save(1, STATE)


@pytest.mark.parametrize(
    "state", [{}, [], {"../x": 1}, {"a.b": 1}, {"": 1}, {"a": 1, "A": 2}, {"state": 1}, {3: 1}], ids=str
)
def test_component_names_that_make_no_file_name_are_refused(state: Any, run: Checkpointer) -> None:
    with pytest.raises(InvalidOption, match=r"component|state must be"):
        run.save(1, state)


def test_a_second_live_run_is_refused_and_reading_is_not(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, STATE).result()
        other = Checkpointer(tmp_path / "run")
        with pytest.raises(RunLocked, match=rf"pid {os.getpid()}"):
            other.save(2, STATE)
        assert [entry.step for entry in other.ls()] == [1]
        assert other.verify() == []
        other.close()


def test_a_run_that_was_taken_over_publishes_nothing_more(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path / "run")
    first.save(1, STATE).result()
    with Checkpointer(tmp_path / "run", run=RunOptions(takeover=True)) as second:
        second.save(2, STATE).result()
        with pytest.raises(LeaseLost, match="taken over"):
            first.save(3, STATE).result()
        assert [entry.step for entry in second.ls()] == [1, 2]
    first.close()


def test_where_there_is_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "none")
    assert run.ls() == []
    with pytest.raises(CheckpointNotFound, match="no checkpoint"):
        run.verify()
    with Checkpointer(tmp_path / "new") as new:
        assert new.resume({"w": torch.zeros(1)}) == 0
        with pytest.raises(CheckpointNotFound, match="no checkpoint of step 7"):
            new.restore({"w": torch.zeros(1)}, 7)
        new.save(1, STATE).result()
        with pytest.raises(asyncckpt.UnknownName, match=r"components are w, meta"):
            new.load_tensors(1, ["model"])
