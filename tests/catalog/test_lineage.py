"""The manifest names the checkpoint that a save comes from, and a listing marks what training has left."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.branches import saved, state, steps
from typer.testing import CliRunner

from asyncckpt import Checkpointer, KeepBest, KeepEvery, KeepLast, KeepSteps, Run, RunOptions
from asyncckpt.catalog.lineage import Lineage, abandoned
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.app import app
from asyncckpt.testing import FaultyOps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def parents(path: Path) -> dict[int, int | None]:
    """Each step with the step that it came from, None where its manifest names none."""
    entries = Run(path).ls()
    steps = {entry.attempt: entry.step for entry in entries}
    return {entry.step: steps.get(entry.parent) if entry.parent else None for entry in entries}


def left(path: Path) -> list[int]:
    return [entry.step for entry in Run(path).ls() if entry.abandoned]


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_each_save_names_the_one_before_it_also_in_the_next_process(path: Path) -> None:
    saved(path, 1, 2)
    with Checkpointer(path) as run:
        run.resume(state(0))
        run.save(3, state(3))
        run.save(4, state(4)).result()
    assert parents(path) == {1: None, 2: 1, 3: 2, 4: 3}


def test_going_back_names_what_training_went_back_to(path: Path) -> None:
    saved(path, 1, 2, 3)
    with Checkpointer(path) as run:
        run.restore(state(0), step=1)
        run.save(2, state(102)).result()
    assert parents(path) == {1: None, 3: None, 2: 1}  # the checkpoint that 3 came from has been replaced
    assert left(path) == [3]


@pytest.mark.parametrize("how", ["a part", "through Run", "weights"])
def test_restoring_a_part_changes_no_parent(path: Path, how: str) -> None:
    saved(path, 1, 2)
    with Checkpointer(path) as run:
        run.resume(state(0))
        if how == "a part":
            run.restore(state(0), step=1, include=["w"])
        elif how == "through Run":
            Run(path).restore(state(0), step=1)
        else:
            run.load_tensors(1)
        run.save(3, state(3)).result()
    assert parents(path)[3] == 2
    assert left(path) == []


def test_a_save_that_failed_is_nobodys_parent_though_the_next_one_had_begun(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1)).result()
        ops = run._store.ops = FaultyOps()
        ops.fail = ("rename_noreplace", 1, errno.EIO)
        failed, after = run.save(2, state(2)), run.save(3, state(3))
        assert failed.exception(30) is not None
        after.result(30)
    assert parents(path) == {1: None, 3: 1}


def test_a_run_that_begins_anew_has_no_parent(path: Path) -> None:
    saved(path, 5, 6)
    with Checkpointer(path, run=RunOptions(overwrite=True)) as run:
        run.save(1, state(1)).result()
    assert parents(path)[1] is None
    assert left(path) == [5, 6]


def test_going_back_while_a_save_is_in_flight(path: Path) -> None:
    saved(path, 1, 2)
    with Checkpointer(path) as run:
        run.resume(state(0))
        run.save(3, state(3))
        run.restore(state(0), step=1)
        run.save(2, state(102)).result()
        run.wait()
    assert parents(path)[2] == 1


def test_of_saves_in_any_order_of_their_ends() -> None:
    line = Lineage()
    line.go_to("origin")
    for sequence in (1, 2, 3):
        line.begin(sequence)
    assert line.parent_of(1) == "origin"
    line.end(1, None)
    assert line.parent_of(2) == "origin"
    line.end(2, "second")
    assert line.parent_of(3) == "second"
    line.end(3, None)
    line.end(3, None)  # told twice
    line.begin(4)
    assert line.parent_of(4) == "second"


# -- what is told of it ------------------------------------------------------------------------------------------------


def test_ls_marks_what_the_newest_does_not_descend_from(path: Path) -> None:
    saved(path, 10, 20, 25, 30)
    with Checkpointer(path) as run:
        run.restore(state(0), step=20)
        run.save(28, state(128)).result()
        run.save(40, state(140)).result()
    assert left(path) == [25, 30]
    rows = json.loads(CliRunner().invoke(app, ["ls", str(path), "--json"]).stdout)
    assert [row["step"] for row in rows if row["abandoned"]] == [25, 30]
    assert rows[-1]["parent"] == Run(path).ls()[-2].attempt
    table = CliRunner().invoke(app, ["ls", str(path)]).stdout
    assert sum("training went back and left it" in line for line in table.splitlines()) == 2


@dataclass(frozen=True)
class Row:
    step: int
    sequence: int
    parent: str = ""
    kind: str = "full"
    damage: str | None = None
    renamed: bool = False

    @property
    def attempt(self) -> str:
        return f"attempt-{self.sequence}" if self.sequence else "old"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.step}-{self.sequence}"


def _left(*rows: Row) -> list[int]:
    names = abandoned(rows)
    return sorted(row.sequence for row in rows if row.name in names)


def test_only_what_is_certain_is_marked() -> None:
    line = [Row(10, 1), Row(20, 2, "attempt-1"), Row(30, 3, "attempt-2")]
    assert _left(*line) == []
    back = Row(15, 4, "attempt-1")
    assert _left(*line, back) == [2, 3]
    assert _left(*line[1:], back, Row(40, 5, "attempt-4")) == [2, 3], "15 is reached, 20 and 30 are past it"
    assert _left(*line, Row(40, 5, "attempt-4")) == [], "15 was deleted: anything may have come before it"
    assert _left(*line, Row(25, 5, "attempt-4")) == [3], "but nothing of a later step"
    assert _left(*line, Row(40, 9)) == [], "a manifest without a parent says nothing"
    assert _left(Row(10, 0), Row(30, 0), Row(20, 1)) == [0], "those without a number are older than all others"


def test_weights_of_the_same_step_are_of_the_same_line() -> None:
    weights = Row(20, 3, "attempt-2", kind="weights")
    assert _left(Row(20, 2), weights, Row(30, 4, "attempt-3")) == []
    assert _left(Row(20, 2), weights) == []


def test_copies_and_damaged_ones_decide_nothing() -> None:
    line = [Row(10, 1), Row(20, 2, "attempt-1"), Row(30, 3, "attempt-2")]
    copy = Row(10, 9, "attempt-1", renamed=True)
    damaged = Row(10, 9, "attempt-1", damage="bad")
    assert _left(*line, copy) == _left(*line, damaged) == []


# -- what is kept of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [KeepEvery(10), KeepSteps([20, 30]), KeepBest("loss", n=2)], ids=repr)
def test_milestones_and_the_best_of_a_branch_stay_until_the_line_reaches_their_step(path: Path, keep: object) -> None:
    policies = [KeepLast(2), keep]
    with Checkpointer(path, keep=policies) as run:  # type: ignore[arg-type]
        for step in (10, 20, 30, 32):
            run.save(step, state(step), metrics={"loss": 1 / step if step < 32 else 5.0}).result()
        run.wait()
        run.restore(state(0), step=20)
        for step in (22, 24, 26):
            run.save(step, state(100 + step), metrics={"loss": 1.0}).result()
            run.wait()
            assert {20, 30} <= set(steps(path)), "a branch's milestone went before the line had reached its step"
        run.save(34, state(134), metrics={"loss": 1.0}).result()
        run.wait()
        assert 30 not in steps(path)
        assert {20, 26, 34} <= set(steps(path))


def test_the_best_of_a_branch_takes_no_place_from_the_best_of_the_line(path: Path) -> None:
    with Checkpointer(path, keep=[KeepLast(1), KeepBest("loss")]) as run:
        run.save(1, state(1), metrics={"loss": 3.0}).result()
        run.wait()
        Run(path).pin(1)
        run.save(9, state(9), metrics={"loss": 0.1}).result()
        run.wait()
        run.restore(state(0), step=1)
        for step, loss in ((2, 0.5), (3, 2.0), (4, 2.0)):
            run.save(step, state(step), metrics={"loss": loss}).result()
            run.wait()
    assert steps(path) == [1, 9, 2, 4]


def test_a_pinned_one_of_a_branch_stays(path: Path) -> None:
    saved(path, 10, 20, 30)
    Run(path).pin(30)
    with Checkpointer(path, keep=KeepLast(1)) as run:
        run.restore(state(0), step=10)
        run.save(40, state(140)).result()
        run.wait()
    assert steps(path) == [30, 40]


def test_the_report_of_a_restore_names_the_attempt(path: Path) -> None:
    saved(path, 1)
    entry: CheckpointInfo = Run(path).ls()[0]
    assert Run(path).restore(state(0)).attempt == entry.attempt != ""


def test_a_weights_only_save_is_on_the_line(path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with Checkpointer(path) as run:
        run.save(1, {"m": model}).result()
        run.save(2, {"m": model}, weights_only=True).result()
        run.save(3, {"m": model}).result()
    assert parents(path) == {1: None, 2: 1, 3: 2}
