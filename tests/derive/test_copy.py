"""``copy``: what arrives is what was there, to the byte, or nothing is."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.disk_faults import strike_everywhere
from support.scenarios import SCENARIOS, generation_in, state_of
from typer.testing import CliRunner

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    CheckpointNotFound,
    InvalidOption,
    KeepLast,
    Run,
    RunLocked,
    StepExists,
)
from asyncckpt.cli.app import app
from asyncckpt.derive import copy
from asyncckpt.storage.local import LocalStore


def saved(path: Path, *generations: int, scenario: str = "safetensors") -> Path:
    with SCENARIOS[scenario].checkpointer(path, keep=()) as run:
        for generation in generations:
            run.save(generation, state_of(generation), metrics={"loss": 1.0}).result()
    return path


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("scenario", ["safetensors", "links", "encoded", "delta", "zarr", "zarr-planes"])
def test_copies_are_equal_to_the_byte_and_are_a_run(scenario: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1, 2, 3, scenario=scenario)
    Run(path).annotate(2, {"val": 0.5})
    Run(path).pin(1)
    done = copy(path, tmp_path / "other")
    assert [(one.step, one.there) for one in done] == [(1, False), (2, False), (3, False)]
    for entry in Run(path).ls():
        assert content(Path(entry.path)) == content(tmp_path / "other" / entry.name)
    other = Run(tmp_path / "other")
    assert [(e.step, e.metrics, e.pinned, e.abandoned) for e in other.ls()] == [
        (1, {"loss": 1.0}, False, False),
        (2, {"loss": 1.0, "val": 0.5}, False, False),
        (3, {"loss": 1.0}, False, False),
    ]
    assert all(other.verify_entry(entry) == [] for entry in other.ls())
    with Run(path).open(3) as opened:
        assert other.verify(3, expect_digest=opened.manifest.file_digest) == []
    with Checkpointer(tmp_path / "other", keep=KeepLast(2)) as run:
        live = state_of(-1)
        assert run.resume(live) == 3
        run.save(4, state_of(4)).result()
    assert [entry.step for entry in other.ls()] == [3, 4]


def test_a_copy_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1, 2)
    copy(path, tmp_path / "other", [2])
    assert [(one.step, one.there) for one in copy(path, tmp_path / "other")] == [(1, False), (2, True)]
    Run(path).annotate(2, {"val": 0.5})
    for _ in range(2):
        assert all(one.there for one in copy(path, tmp_path / "other"))
    assert Run(tmp_path / "other").ls()[1].annotated == {"val": 0.5}


def test_another_checkpoint_of_the_name_is_left_as_it_is(tmp_path: Path) -> None:
    path, other = saved(tmp_path / "run", 1), saved(tmp_path / "other", 1)
    before = content(other)
    with pytest.raises(StepExists, match="another checkpoint than"):
        copy(path, other)
    (tmp_path / "third" / "step-00000001").mkdir(parents=True)
    (tmp_path / "third" / "step-00000001" / "mine").touch()
    with pytest.raises(StepExists, match="left as it is"):
        copy(path, tmp_path / "third")
    after = content(other)
    assert {name: data for name, data in after.items() if "lease" not in name} == {
        name: data for name, data in before.items() if "lease" not in name
    }


def test_damage_does_not_travel(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1, 2)
    shard = next((path / "step-00000001").glob("w-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="do not match their digest"):
        copy(path, tmp_path / "other")
    assert Run(tmp_path / "other").ls() == []
    assert not list((tmp_path / "other").glob(".tmp-*"))
    shard.unlink()
    assert [one.step for one in copy(path, tmp_path / "other")] == [2]
    with pytest.raises(CheckpointDamaged, match="Nothing was copied"):
        copy(path, tmp_path / "other", [1])


def test_what_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidOption, match="to itself"):
        copy(path, path)
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 7"):
        copy(path, tmp_path / "other", [7])
    with pytest.raises(CheckpointNotFound, match="no usable checkpoint"):
        copy(tmp_path / "empty", tmp_path / "other")
    with Checkpointer(tmp_path / "live") as run:
        run.save(5, state_of(5)).result()
        assert [one.step for one in copy(run.path, tmp_path / "other")] == [5]  # a live run can be copied
        with pytest.raises(RunLocked):
            copy(path, run.path)


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1, 2)
    result = call("copy", path, tmp_path / "other", "latest")
    assert result.stdout.startswith(f"copied  {tmp_path}/other/step-00000002  ")
    rows = json.loads(call("copy", path, tmp_path / "other", "--json").stdout)
    assert [(row["step"], row["there"]) for row in rows] == [(1, False), (2, True)]
    assert call("copy", path, tmp_path / "other", "9").exit_code == 3
    assert call("copy", path, path).exit_code == 2


@pytest.mark.parametrize("dies", [False, True], ids=["error", "death"])
def test_wherever_it_is_struck_there_is_a_whole_copy_or_none(dies: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1, 2)
    copy(path, tmp_path / "first", [1])

    def make(name: Path) -> Path:
        return Path(shutil.copytree(tmp_path / "first", tmp_path / name))

    def act(store: LocalStore) -> None:
        with mock.patch("asyncckpt.derive.copying.open_store", return_value=store):
            copy(path, store.path)

    assert strike_everywhere(make, act, dies=dies) > 10
    for other in itertools.chain(tmp_path.glob("*-True"), tmp_path.glob("*-False")):
        copy(path, other)
        assert [generation_in(Run(other), step) for step in (1, 2)] == [1, 2]
        assert not list(other.glob(".tmp-*"))
