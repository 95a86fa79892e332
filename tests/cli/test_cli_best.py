"""``asyncckpt best`` and ``Run.best``: which checkpoint has the best value, and what is said where none has one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.branches import state
from typer.testing import CliRunner

from asyncckpt import Checkpointer, CheckpointNotFound, InvalidOption, KeepBest, Run
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.app import app

LOSSES = {1: 3.0, 2: 1.0, 3: math.nan, 4: 1.0, 5: 2.0}


@pytest.fixture
def run(tmp_path: Path) -> str:
    with Checkpointer(tmp_path / "run") as run:
        for step, loss in LOSSES.items():
            run.save(step, state(step), metrics={"loss": loss, "acc": -loss} if step != 5 else {"loss": loss}).result()
    return str(tmp_path / "run")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_best_value_wins_and_of_equals_the_later_save(run: str) -> None:
    assert Run(run).best("loss").step == 4
    assert Run(run).best("loss", "max").step == 1
    assert Run(run).best("acc", "min").step == 1
    result = call("best", run)
    assert result.exit_code == 0
    assert "step-00000004  step 4, full  loss=1 acc=-1" in result.stdout
    assert json.loads(call("best", run, "--metric", "acc", "--mode", "max", "--json").stdout)["step"] == 4


def test_a_metric_that_was_annotated_counts(run: str) -> None:
    Run(run).annotate(5, {"loss": 0.5})
    assert Run(run).best("loss").step == 5


def test_a_damaged_checkpoint_and_a_copy_are_never_the_best(run: str) -> None:
    (Path(run) / "step-00000004" / "state.json").write_bytes(b"")
    (Path(run) / "step-00000002").rename(Path(run) / "mine")
    assert Run(run).best("loss").step == 5


def test_kinds_can_be_looked_at_apart(run: str) -> None:
    with Checkpointer(run) as again:
        again.save(7, {"model": torch.nn.Linear(2, 2)}, metrics={"loss": 0.1}, weights_only=True).result()
    assert Run(run).best("loss").step == 7
    assert Run(run).best("loss", kind="full").step == 4
    assert "step 7, weights" in call("best", run, "--kind", "weights").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--metric", "accuracy", "--mode", "max"], 2, "metrics there: acc, loss"),
        (["--metric", "acc"], 2, "mode='min', or more, mode='max'"),
        (["--mode", "least"], 2, "give min or max"),
        (["--kind", "both"], 2, "kind must be 'full', 'weights'"),
        (["--kind", "weights"], 3, "no usable checkpoint of kind 'weights'"),
    ],
)
def test_what_cannot_be_found_is_told_in_one_line(run: str, arguments: list[str], code: int, told: str) -> None:
    result = call("best", run, *arguments)
    assert (result.exit_code, told in result.stderr) == (code, True), result.output
    assert len(result.stderr.splitlines()) == 1


def test_a_run_without_checkpoints_has_no_best(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no usable checkpoint here"):
        Run(tmp_path).best("loss")
    with pytest.raises(InvalidOption, match="metric must be the name"):
        Run(tmp_path).best("")


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(width=32)), max_size=8), st.sampled_from(["min", "max"]))
def test_the_best_is_what_keep_best_keeps(values: list[float | None], mode: Any) -> None:
    rows = [
        CheckpointInfo(step=i, name=str(i), path="", sequence=i, metrics={} if value is None else {"m": value})
        for i, value in enumerate(values)
    ]
    policy = KeepBest("m", mode=mode)
    ranked = policy.ranked(rows)
    if ranked:
        assert policy.keep(rows) == {ranked[0].step}
    usable = [value for value in values if value is not None and not math.isnan(value)]
    assert [row.metrics["m"] for row in ranked] == sorted(usable, reverse=mode == "max")
