"""A path that is a checkpoint itself is recognised, and nothing is written into it; a bucket is no directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.branches import saved, state, steps, value
from typer.testing import CliRunner

from asyncckpt import Checkpointer, InvalidOption, Run, RunPathError, Safetensors, Zarr
from asyncckpt.catalog.misplaced import is_checkpoint
from asyncckpt.cli.app import app
from asyncckpt.doctor import examine
from asyncckpt.storage import local_path, open_store, scheme_of


def _inside(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


@pytest.fixture(params=[Safetensors(), Safetensors(codec="zstd"), Zarr()], ids=["plain", "encoded", "zarr"])
def deep(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run", files=request.param) as run:
        run.save(100, state(100)).result()
    return tmp_path / "run" / "step-00000100"


WAYS: dict[str, Callable[[Path], Any]] = {
    "resume": lambda path: Checkpointer(path).resume(state(0)),
    "save": lambda path: Checkpointer(path).save(1, state(1)),
    "prepare": lambda path: Checkpointer(path).prepare(state(0)),
    "prune": lambda path: Checkpointer(path).prune(),
    "restore": lambda path: Run(path).restore(state(0)),
    "restore a step": lambda path: Run(path).restore(state(0), step=100),
    "restore through a checkpointer": lambda path: Checkpointer(path).restore(state(0)),
    "load tensors": lambda path: Run(path).load_tensors(),
    "ls": lambda path: Run(path).ls(),
    "open": lambda path: Run(path).open(),
    "verify": lambda path: Run(path).verify(),
    "pin": lambda path: Run(path).pin(100),
    "doctor": lambda path: examine(path, seconds=0),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_call_names_the_run_and_writes_nothing(way: str, deep: Path) -> None:
    before = _inside(deep)
    with pytest.raises(RunPathError, match=r"is a checkpoint.*Give ") as raised:
        WAYS[way](deep)
    assert f"Give {deep.parent};" in str(raised.value)
    assert _inside(deep) == before
    assert value(deep.parent) == 100


VERBS = [
    ("ls",),
    ("verify",),
    ("show",),
    ("pin", "100"),
    ("unpin", "100"),
    ("prune", "--keep-last", "1"),
    ("export", "100", "out.safetensors"),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_every_verb_says_so(verb: tuple[str, ...], tmp_path: Path) -> None:
    saved(tmp_path / "run", 100)
    deep = tmp_path / "run" / "step-00000100"
    before = _inside(deep)
    name, *more = verb
    done = CliRunner().invoke(app, [name, f"{deep}/", *more])
    assert done.exit_code == 2
    assert f"Give {deep.parent};" in done.output.replace("\n", "")
    assert _inside(deep) == before


def test_a_damaged_manifest_makes_it_no_run_directory(tmp_path: Path) -> None:
    saved(tmp_path / "run", 100)
    deep = tmp_path / "run" / "step-00000100"
    (deep / "manifest.json").write_text("{")
    with pytest.raises(RunPathError, match="is a checkpoint"):
        Checkpointer(deep).resume(state(0))


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": '{"name": "an app", "start_url": "/"}'},
        {"manifest.json": '{"name": "an app"}', "state.json": "{}"},
        {"model-00001-of-00002.safetensors": "weights", "config.json": "{}"},
        {"manifest.json": ""},
    ],
    ids=" ".join,
)
def test_files_of_others_make_a_run_directory_no_checkpoint(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    assert not is_checkpoint(open_store(tmp_path / "run"))
    saved(tmp_path / "run", 1)
    assert steps(tmp_path / "run") == [1]
    assert {name: (tmp_path / "run" / name).read_text() for name in files} == files


def test_a_run_that_lies_in_a_checkpoint_all_the_same_goes_on(tmp_path: Path) -> None:
    saved(tmp_path / "run", 100)
    deep = tmp_path / "run" / "step-00000100"
    saved(tmp_path / "other", 101)
    os.rename(tmp_path / "other" / "step-00000101", deep / "step-00000101")  # as earlier versions let it come about
    with Checkpointer(deep) as run:
        assert run.resume(state(0)) == 101
    with Checkpointer(tmp_path / "run") as run:
        assert run.resume(state(0)) == 100


# -- buckets -----------------------------------------------------------------------------------------------------------

BUCKETS = ["s3://bucket/run", "S3://bucket/run", "gs://b/r", "hf://u/m", "s3:/bucket/run", "dbfs:/mnt/run", "weird://x"]


@pytest.mark.parametrize("address", BUCKETS)
def test_a_bucket_never_becomes_a_local_directory(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in {address, Path(address) if scheme_of(Path(address)) != "file" else address}:
        for use in (Run, Checkpointer, examine, local_path):
            with pytest.raises(InvalidOption):
                use(given)  # type: ignore[operator]
    for verb in (("ls", address), ("doctor", address, "--seconds", "0")):
        assert CliRunner().invoke(app, list(verb)).exit_code == 2
    assert os.listdir(tmp_path) == []


def test_a_directory_may_be_called_like_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    assert local_path("./s3:/run") == str(tmp_path / "s3:" / "run")
    assert open_store("./s3:/run").address == str(tmp_path / "s3:" / "run")
