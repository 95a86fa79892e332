"""What somebody else renamed, copied or left in a run's directory is readable, and is never deleted or counted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from support.branches import saved, state, steps, value

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    KeepLast,
    NoUsableCheckpoint,
    Preempted,
    Preemption,
    Run,
    RunOptions,
    StepExists,
)
from asyncckpt.errors import AsyncCkptError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_renamed_checkpoint_and_a_copy_are_listed_and_readable_and_never_deleted_or_counted(path: Path) -> None:
    saved(path, 1, 2, 3)
    (path / "step-00000001").rename(path / "best")
    shutil.copytree(path / "step-00000002", path / "paper-copy-7")
    shutil.copytree(path / "step-00000003", path / "step-00000003.orig")
    with Checkpointer(path, keep=KeepLast(2)) as run:
        assert run.resume(state(0)) == 3
        for step in (4, 5, 6):
            run.save(step, state(step)).result()
    found = {entry.name: entry for entry in Run(path).ls()}
    assert {name for name, entry in found.items() if entry.renamed} == {"best", "paper-copy-7", "step-00000003.orig"}
    assert {name for name, entry in found.items() if not entry.renamed} == {"step-00000005", "step-00000006"}
    assert [found[name].step for name in ("best", "paper-copy-7", "step-00000003.orig")] == [1, 2, 3]
    assert all(entry.damage is None and Run(path).verify_entry(entry) == [] for entry in found.values())
    assert [value(path, step) for step in (1, 2, 3, 5, 6)] == [1, 2, 3, 5, 6]
    assert value(path) == 6


def test_the_runs_own_checkpoint_comes_before_a_copy_of_it(path: Path) -> None:
    saved(path, 1, 2)
    shutil.copytree(path / "step-00000002", path / "a-copy")
    shutil.copytree(path / "step-00000001", path / "step-00000002-copy")
    assert Run(path).pin(2).name == "step-00000002"
    assert Run(path).verify_entry(Run(path).pin(1)) == []
    with Checkpointer(path) as run, contextlib.closing(run.open(2)) as reader:
        assert reader.name == "step-00000002"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_copy_under_the_name_of_another_step_is_told_and_kept(path: Path, overwrite: bool, when: str) -> None:
    """Nobody can tell it from a checkpoint that got another's manifest by a fault of the storage."""
    saved(path, 1)

    def copy() -> None:
        shutil.copytree(path / "step-00000001", path / "step-00000002")

    if when == "before":
        copy()
    run = Checkpointer(path, run=RunOptions(overwrite=overwrite))
    run.prepare(state(1))
    if when == "meanwhile":
        copy()
    with pytest.raises(CheckpointDamaged, match="its manifest is that of step-00000001"):
        Run(path).restore(state(0), step=2)
    with pytest.raises(CheckpointDamaged, match="its manifest is that of step-00000001"):
        Run(path).load_tensors(2)
    assert Run(path).verify(2)
    if overwrite or when == "before":
        run.save(2, state(2)).result()
        assert value(path, 2) == 2
    else:
        with pytest.raises(StepExists):
            run.save(2, state(2)).result()
    run.close()
    [kept] = list(path.glob(".damaged-step~00000002-*")) or [path / "step-00000002"]
    assert sorted(os.listdir(kept)) == sorted(os.listdir(path / "step-00000001"))
    assert value(path, 1) == 1


def test_who_overwrites_a_run_from_the_start_gets_all_of_its_saves(path: Path) -> None:
    """Also the last one, whose step the run before had reached: then its checkpoint would stay the newest."""
    for turn in (0, 100):
        with Checkpointer(path, every=10, run=RunOptions(overwrite=True)) as run:
            for step in range(1, 21):
                run.step(step, state(turn + step))
        assert steps(path) == [10, 20]
        assert (value(path, 10), value(path)) == (turn + 10, turn + 20)


def test_who_overwrites_and_is_preempted_saves_though_the_run_before_had_this_step(path: Path) -> None:
    saved(path, 1, 2, 3)
    with (
        pytest.raises(Preempted),
        Checkpointer(path, preemption=Preemption((signal.SIGUSR1,)), run=RunOptions(overwrite=True)) as run,
    ):
        run.step(1, state(101))
        os.kill(os.getpid(), signal.SIGUSR1)
        run.step(2, state(102))
    assert value(path) == 102


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_overwriting_deletes_nothing_that_is_no_checkpoint(path: Path, kind: str) -> None:
    saved(path, 1)
    target = path / "step-00000002"
    if kind == "directory":
        target.mkdir()
        (target / "notes").write_text("mine")
    else:
        target.write_text("mine")
    with contextlib.suppress(AsyncCkptError), Checkpointer(path, run=RunOptions(overwrite=True)) as run:
        assert isinstance(run.save(2, state(2)).exception(30), StepExists)
    assert (target / "notes" if kind == "directory" else target).read_text() == "mine"


def test_a_run_that_holds_copies_alone_does_not_start_anew(path: Path) -> None:
    saved(path, 1)
    (path / "step-00000001").rename(path / "best")
    with Checkpointer(path) as run, pytest.raises(NoUsableCheckpoint, match="copies, or were renamed"):
        run.resume(state(0))
