"""What is overwritten waits for its readers; an empty directory makes room; gone is told by the inode."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.branches import saved, state, steps, value

from asyncckpt import CheckpointDamaged, Checkpointer, Run, RunOptions, StepExists
from asyncckpt.read.extents import read_small_file
from asyncckpt.restore import carrying_out
from asyncckpt.restore import restore as restoring
from asyncckpt.testing import FaultyOps

OVERWRITE = RunOptions(overwrite=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def trash(path: Path) -> list[str]:
    # ``latest`` is rewritten after a save was acknowledged
    dotted = (name for name in os.listdir(path) if name.startswith((".trash-", ".tmp-")))
    return [name for name in dotted if not name.startswith(".tmp-latest-")]


def test_what_is_overwritten_stays_readable_until_its_reader_is_done(path: Path) -> None:
    saved(path, 1, 2)
    with Checkpointer(path, run=OVERWRITE) as run:
        run.resume(state(0))
        with run.open(2) as old:
            run.save(2, state(102)).result()
            assert value(path) == 102
            assert len(trash(path)) == 1
            assert trash(path)[0].startswith(".trash-step~00000002-")
            assert b'"value":2' in read_small_file(old.reader, old.manifest, "state.json", 1 << 20)
            assert restoring.load_tensors(old, ["w"])["w.value"].tolist() == [2] * 700
            run.save(3, state(103)).result()
            assert len(trash(path)) == 1, "it went while it was read"
        run.save(4, state(104)).result()
    assert trash(path) == []
    assert steps(path) == [1, 2, 3, 4]


def test_nobody_reads_it_and_it_is_gone_at_once(path: Path) -> None:
    saved(path, 1)
    with Checkpointer(path, run=OVERWRITE) as run:
        run.resume(state(0))
        run.save(1, state(101)).result()
        run.wait()
        assert trash(path) == []
    assert value(path) == 101


def test_the_next_run_leaves_to_a_reader_what_it_still_reads(path: Path) -> None:
    saved(path, 1)
    with Checkpointer(path, run=OVERWRITE) as run:
        run.resume(state(0))
        old = run.open(1)
        run.save(1, state(101)).result()
    with contextlib.closing(old), Checkpointer(path) as run:
        run.resume(state(0))
        assert len(trash(path)) == 1
        assert restoring.load_tensors(old, ["w"])["w.value"].tolist() == [1] * 700
        old.close()
        run.save(2, state(2)).result()
        run.wait()
        assert trash(path) == []


def test_trash_that_cannot_be_moved_is_left_to_the_next_run(path: Path) -> None:
    saved(path, 1)
    with Checkpointer(path, run=OVERWRITE) as run:
        run.resume(state(0))
        ops = run._store.ops = FaultyOps()
        ops.fail = ("rename_noreplace", 1, errno.EIO)
        run.save(1, state(101)).result()
    assert value(path) == 101
    assert len(trash(path)) == 1
    with Checkpointer(path) as run:
        run.resume(state(0))
        assert trash(path) == []


def test_a_restore_beside_an_overwrite_falls_back_to_nothing_older(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no lock keeps it from being deleted: its files go while they are read, and another has its name by then."""
    saved(path, 1, 2)
    original, done = carrying_out.fill, []

    def fill(checkpoint: Any, *plan: Any, **options: Any) -> int:
        if not done:
            done.append(True)
            saved(path.parent / "new", 2)  # what takes the place has another inode
            shutil.rmtree(path / "step-00000002")
            os.rename(path.parent / "new" / "step-00000002", path / "step-00000002")
            checkpoint.reader.close()
            raise CheckpointDamaged("a file is missing")
        return original(checkpoint, *plan, **options)

    monkeypatch.setattr(carrying_out, "fill", fill)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Run(path).restore(live := state(0)).step == 2
    assert done
    assert live["w"].tolist() == [2] * 700


def test_tensors_are_loaded_from_what_took_the_place_of_the_one_being_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(path, 1)
    saved(path.parent / "new", 1)
    original, done = restoring.load_tensors, []

    def load_tensors(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        if not done:
            done.append(True)
            os.rename(path / "step-00000001", path.parent / "old")
            os.rename(path.parent / "new" / "step-00000001", path / "step-00000001")
            raise CheckpointDamaged("a file is missing")
        return original(*args, **options)

    monkeypatch.setattr(restoring, "load_tensors", load_tensors)
    assert Run(path).load_tensors(1)["w.value"].tolist() == [1] * 700


# -- empty directories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [RunOptions(), OVERWRITE], ids=["plain", "overwrite"])
def test_an_empty_directory_makes_room_for_a_checkpoint(path: Path, options: RunOptions) -> None:
    (path / "step-00000001").mkdir(parents=True)
    assert steps(path) == []
    with Checkpointer(path, run=options) as run:
        assert run.resume(state(0)) == 0
        run.save(1, state(1)).result()
    assert (steps(path), value(path)) == ([1], 1)
    assert Run(path).verify() == []
    assert trash(path) == []


@pytest.mark.parametrize("what", ["a file in it", "a link to an empty one", "a file"])
def test_what_is_not_empty_is_left_as_it_is(path: Path, what: str) -> None:
    path.mkdir()
    taken = path / "step-00000001"
    if what == "a file in it":
        taken.mkdir()
        (taken / "notes").write_text("mine")
    elif what == "a file":
        taken.write_text("mine")
    else:
        (path.parent / "elsewhere").mkdir()
        taken.symlink_to(path.parent / "elsewhere")
    with Checkpointer(path) as run:
        assert isinstance(run.save(1, state(1)).exception(30), StepExists)
    if what == "a file in it":
        assert (taken / "notes").read_text() == "mine"
    else:
        assert taken.is_symlink() or taken.read_text() == "mine"
    assert trash(path) == []
