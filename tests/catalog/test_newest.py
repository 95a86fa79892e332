"""Whoever names no step means one and the same newest checkpoint; where it is damaged, nobody gets an older one."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.branches import saved, state, steps, value
from torch.distributed.checkpoint import CheckpointException
from typer.testing import CliRunner

from asyncckpt import (
    Checkpointer,
    CheckpointNotFound,
    NewestDamaged,
    NoUsableCheckpoint,
    Run,
    RunOptions,
    repeated_lines,
)
from asyncckpt.cli.app import app
from asyncckpt.integrations.dcp import Reader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved(tmp_path / "run", 1, 2, 3)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the log hold back no line that another test has logged, too."""
    monkeypatch.setattr(repeated_lines, "WINDOW_SECONDS", 0.0)


NEWEST = "step-00000003"


def _shard(path: Path) -> Path:
    return next(Path(path, NEWEST).glob("w-*.safetensors"))


def _truncate(file: Path, nbytes: int) -> None:
    os.truncate(file, nbytes)


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


#: What can happen to the newest checkpoint that a look at names and sizes shows.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "the manifest is cut": lambda path: _truncate(path / NEWEST / "manifest.json", 100),
    "the manifest is empty": lambda path: _truncate(path / NEWEST / "manifest.json", 0),
    "the manifest is gone": lambda path: (path / NEWEST / "manifest.json").unlink(),
    "the manifest is noise": lambda path: (path / NEWEST / "manifest.json").write_bytes(os.urandom(500)),
    "the manifest is a directory": lambda path: (
        (path / NEWEST / "manifest.json").unlink(),
        (path / NEWEST / "manifest.json").mkdir(),
    ),
    "a data file is cut": lambda path: _truncate(_shard(path), 10),
    "a data file is gone": lambda path: _shard(path).unlink(),
    "the plain values are cut": lambda path: _truncate(path / NEWEST / "state.json", 1),
    "all but the data is gone": lambda path: [
        (path / NEWEST / name).unlink() for name in ("manifest.json", "state.json")
    ],
    "all is gone but the directory": lambda path: _empty(path / NEWEST),
    "it has the name of another step": lambda path: (path / NEWEST).rename(path / "step-00000004"),
}

#: Every call of ``Run`` that reads a checkpoint and can be given no step.
CALLS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: Run(path).open(),
    "load_tensors": lambda path: Run(path).load_tensors(),
    "load_tensors by name": lambda path: Run(path).load_tensors(names=["w"]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_refused_with_what_to_do(path: Path, damage: str, call: str) -> None:
    DAMAGES[damage](path)
    with pytest.raises(
        NewestDamaged, match=r"no older one is read in its place unasked.*newest usable one is 2"
    ) as told:
        CALLS[call](path)
    assert told.value.usable_step == 2
    assert "step-0000000" in str(told.value)
    assert value(path, 2) == 2  # the way out works


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_what_verify_ls_newest_and_the_verbs_speak_of(path: Path, damage: str) -> None:
    DAMAGES[damage](path)
    named = "step-00000004" if "another step" in damage else NEWEST
    assert Run(path).verify() != []
    newest = Run(path).newest()
    assert (newest.name, newest.damage is None) == (named, False)
    assert Run(path).ls()[-1] == newest
    out = str(path.with_name("out.safetensors"))
    for arguments in (
        ["verify", str(path)],
        ["show", str(path)],
        ["export", str(path), "latest", out],
        ["pin", str(path), "latest"],
        ["diff", str(path), "1", "latest"],
        ["annotate", str(path), "latest", "val_loss=1"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, named in result.output) == (1, True), (arguments, result.output)
    assert not os.path.exists(out)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damage", DAMAGES)
def test_dcp_is_given_no_older_one_either(path: Path, damage: str) -> None:
    DAMAGES[damage](path)
    with pytest.raises(CheckpointException, match="no older one is read"):
        dcp.load({"w.value": torch.zeros(700)}, storage_reader=Reader(path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_left_of_a_checkpoint_is_no_empty_run_for_dcp(path: Path) -> None:
    _empty(path / NEWEST)
    with pytest.raises(CheckpointException, match="the directory is empty"):
        dcp.load({"w.value": torch.zeros(700)}, storage_reader=Reader(path / NEWEST))


def test_damage_that_only_reading_shows_is_refused_too(path: Path) -> None:
    shard = _shard(path)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert Run(path).newest().damage is None
    assert Run(path).verify() != []
    with pytest.raises(NewestDamaged, match="newest usable one is 2"):
        Run(path).load_tensors()


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_resume_goes_on_from_an_older_one_and_says_so(path: Path, damage: str) -> None:
    DAMAGES[damage](path)
    live = state(0)
    with Checkpointer(path) as run, pytest.warns(RuntimeWarning, match="cannot be used"):
        assert run.resume(live) == 2
    assert int(live["w"][0]) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_step_whose_checkpoint_is_damaged_can_be_saved_again(path: Path, damage: str) -> None:
    DAMAGES[damage](path)
    with Checkpointer(path) as run:
        with pytest.warns(RuntimeWarning, match="cannot be used"):
            run.resume(state(0))
        run.save(5, state(5)).result()
    assert (Run(path).newest().step, value(path)) == (5, 5)


def test_where_nothing_is_usable_that_is_said_and_training_does_not_start_anew(path: Path) -> None:
    for name in ("step-00000001", "step-00000002", NEWEST):
        _empty(path / name)
    with pytest.raises(NewestDamaged, match="no other one of this run is usable") as told:
        Run(path).load_tensors()
    assert told.value.usable_step is None
    with Checkpointer(path) as run, pytest.warns(RuntimeWarning), pytest.raises(NoUsableCheckpoint):
        run.resume(state(0))


def test_a_step_that_was_saved_after_going_back_is_the_newest_where_its_manifest_is_cut(path: Path) -> None:
    """Nothing but the file ``latest`` remembers that it came after step 3."""
    with Checkpointer(path) as run:
        live = state(0)
        run.restore(live, step=1)
        run.save(2, state(20)).result()
    _truncate(path / "step-00000002" / "manifest.json", 50)
    assert Run(path).newest().step == 2
    with pytest.raises(NewestDamaged, match="step-00000002"):
        Run(path).load_tensors()


def test_a_branch_that_training_left_is_not_the_newest(path: Path) -> None:
    with Checkpointer(path) as run:
        run.restore(state(0), step=1)
        run.save(2, state(20)).result()
    assert [(entry.step, entry.abandoned) for entry in Run(path).ls()] == [(1, False), (3, True), (2, False)]
    assert (Run(path).newest().step, value(path), Run(path).verify()) == (2, 20, [])


def test_what_a_save_has_set_aside_is_no_checkpoint_any_more(path: Path) -> None:
    _truncate(path / NEWEST / "manifest.json", 100)
    with Checkpointer(path) as run:
        with pytest.warns(RuntimeWarning):
            run.resume(state(0))
        run.save(3, state(30)).result()
    assert [name for name in os.listdir(path) if name.startswith(".damaged-")]
    assert (steps(path), value(path)) == ([1, 2, 3], 30)


@pytest.mark.parametrize("left", ["nothing", "a link", "a file"])
def test_a_newer_checkpoint_that_somebody_took_away_is_told(
    path: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    (path / NEWEST).rename(path.parent / "elsewhere")
    if left == "a link":
        (path / NEWEST).symlink_to(path.parent / "elsewhere")
    elif left == "a file":
        (path / NEWEST).write_text("mine")
    for call in (value, lambda path: Run(path).newest(), lambda path: Run(path).load_tensors()):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "asyncckpt"):
            call(path)
        assert f"saved {NEWEST} last, and that directory is not there any more" in caplog.text
    caplog.clear()
    assert value(path, 1) == 1  # who names a step is told nothing
    assert not caplog.text


def test_all_calls_mean_the_full_one_where_there_is_one(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(4, {"model": torch.nn.Linear(2, 2)}, weights_only=True).result()
    assert (Run(path).newest().step, value(path)) == (3, 3)
    shown = json.loads(CliRunner().invoke(app, ["show", str(path), "--json"]).stdout)
    assert shown["step"] == 3
    with Run(path).open() as opened:
        assert opened.manifest.step == 3


def test_a_run_of_weights_alone_has_a_newest_too(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            run.save(step, {"model": torch.nn.Linear(2, 2)}, weights_only=True).result()
    assert Run(tmp_path / "run").newest().step == 2


def test_a_run_of_copies_has_none_and_says_why(path: Path) -> None:
    for number, name in enumerate(("step-00000001", "step-00000002", NEWEST)):
        (path / name).rename(path / f"mine-{'abc'[number]}")
    with pytest.raises(CheckpointNotFound, match=r"of its own: they are copies, or renamed; give a step.*mine-"):
        Run(path).newest()


# -- others beside -----------------------------------------------------------------------------------------------------


def _other_tools(path: Path) -> dict[str, list[str]]:
    """Directories as trainers of other libraries leave them, each with a later step than ours."""
    made = {
        "checkpoint-500": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"],
        "global_step900": ["mp_rank_00_model_states.pt"],
        "epoch=7-step=800": ["state.json"],
        "step_700": [".metadata", "__0_0.distcp"],
        "run-600": [],
    }
    for name, files in made.items():
        (path / name).mkdir()
        for file in files:
            (path / name / file).write_bytes(b"theirs")
    return made


def test_what_other_tools_keep_beside_a_run_is_neither_listed_nor_the_newest(path: Path) -> None:
    made = _other_tools(path)
    assert (steps(path), Run(path).newest().step, value(path), Run(path).verify()) == ([1, 2, 3], 3, 3, [])
    with Checkpointer(path) as run:
        assert run.resume(state(0)) == 3
        run.save(4, state(4)).result()
    assert all(sorted(os.listdir(path / name)) == sorted(files) for name, files in made.items())


def test_remains_count_where_the_run_has_such_names(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Checkpointer(path, run=RunOptions(name="checkpoint-{step}")) as run:
        for step in (1, 2):
            run.save(step, state(step)).result()
    (path / "checkpoint-3").mkdir()
    (path / "step-00000009").mkdir()
    assert [(entry.name, entry.damage is None) for entry in Run(path).ls()] == [
        ("checkpoint-1", True),
        ("checkpoint-2", True),
        ("checkpoint-3", False),
    ]
