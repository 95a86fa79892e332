"""What somebody else puts into a checkpoint is reported, never read, and no damage."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from support.branches import saved, state, steps, value
from typer.testing import CliRunner

from asyncckpt import CheckpointDamaged, Checkpointer, KeepLast, Run
from asyncckpt.cli.app import app

EXTRAS: dict[str, Callable[[Path], object]] = {
    ".DS_Store": lambda p: (p / ".DS_Store").write_bytes(b"\0"),
    "config.json": lambda p: (p / "config.json").write_text("{}"),
    ".asyncckpt-lease.lock": lambda p: (p / ".asyncckpt-lease.lock").write_bytes(b""),
    "w-00009-of-00009.safetensors": lambda p: (p / "w-00009-of-00009.safetensors").write_bytes(b"no header"),
    "tokenizer/vocab.txt": lambda p: ((p / "tokenizer").mkdir(), (p / "tokenizer" / "vocab.txt").write_text("a b")),
    "link": lambda p: (p / "link").symlink_to("/etc/passwd"),
    "dangling": lambda p: (p / "dangling").symlink_to("nowhere"),
    "pipe": lambda p: os.mkfifo(p / "pipe"),
    "a/b/c": lambda p: os.makedirs(p / "a" / "b" / "c" / "d"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    saved(tmp_path / "run", 100, 200)
    return tmp_path / "run"


@pytest.mark.parametrize("name", EXTRAS)
def test_the_checkpoint_is_as_good_as_before(name: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    EXTRAS[name](run / "step-00000200")
    entries = Run(run).ls()
    assert [(entry.damage, entry.extra) for entry in entries] == [(None, ()), (None, (name,))]
    assert Run(run).verify() == []
    assert value(run, 200) == 200
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "asyncckpt"), Checkpointer(run) as writer:
        warnings.simplefilter("error")
        assert writer.resume(state(0)) == 200
        writer.save(300, state(300)).result()
    assert [record for record in caplog.records if name in record.message], "nobody is told"
    assert (steps(run), value(run)) == ([100, 200, 300], 300)


def test_the_verbs_report_it_and_exit_with_0(run: Path) -> None:
    for name in (".DS_Store", "config.json"):
        EXTRAS[name](run / "step-00000200")
    for verb in (["verify", str(run)], ["verify", str(run), "--all"]):
        done = CliRunner().invoke(app, verb)
        assert done.exit_code == 0
        assert "config.json" in done.stdout
        assert "good" in done.stdout
        assert "damaged" not in done.stdout
    rows = json.loads(CliRunner().invoke(app, ["verify", str(run), "--json"]).stdout)
    assert [(row["damage"], row["extra"]) for row in rows] == [([], [".DS_Store", "config.json"])]
    rows = json.loads(CliRunner().invoke(app, ["ls", str(run), "--json"]).stdout)
    assert [row["extra"] for row in rows] == [[], [".DS_Store", "config.json"]]
    assert "2 files of somebody else's" in CliRunner().invoke(app, ["ls", str(run)]).stdout


def test_it_goes_with_the_checkpoint_when_retention_deletes_that(run: Path) -> None:
    for name in ("config.json", "tokenizer/vocab.txt", "link"):
        EXTRAS[name](run / "step-00000100")
    with Checkpointer(run, keep=KeepLast(1)) as writer:
        writer.prune()
    assert steps(run) == [200]
    assert not [name for name in os.listdir(run) if name.startswith(".trash")]
    assert os.path.exists("/etc/passwd")


@pytest.mark.parametrize("kind", ["symlink", "pipe", "directory"])
def test_a_listed_file_that_is_no_regular_file_is_damage(kind: str, run: Path) -> None:
    shard = run / "step-00000200" / "w-00001-of-00001.safetensors"
    moved = shard.rename(run.parent / "moved")
    if kind == "symlink":
        shard.symlink_to(moved)
    elif kind == "pipe":
        os.mkfifo(shard)
    else:
        shard.mkdir()
    assert Run(run).ls()[-1].damage is not None
    assert Run(run).verify(200)
    with pytest.raises(CheckpointDamaged):
        Run(run).restore(state(0), step=200)
    with pytest.warns(RuntimeWarning, match="cannot be used"), Checkpointer(run) as writer:
        assert writer.resume(state(0)) == 100
