"""``thin``, and retention that thins out: what is left is whole and linked, and nothing is lost wherever it ends."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.disk_faults import Gone, StruckOps, strike_everywhere
from typer.testing import CliRunner

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    CheckpointNotFound,
    Delta,
    InvalidOption,
    KeepEvery,
    KeepLast,
    RngState,
    Run,
    RunOptions,
    Safetensors,
    StepExists,
    Zarr,
)
from asyncckpt.cli.app import app
from asyncckpt.commit import pruner
from asyncckpt.commit.thinner import thin as thin_one
from asyncckpt.derive import thin
from asyncckpt.events import Event, ThinnedOut
from asyncckpt.protocols import Capability
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.memory import MemoryStore

FILES = {
    "safetensors": Safetensors(),
    "encoded": Safetensors(codec="planes"),
    "delta": Safetensors(codec="planes", delta=Delta(chain=2)),
    "zarr": Zarr(codec="zstd"),
}


def state(step: int) -> dict[str, Any]:
    model = torch.nn.Linear(300, 300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + float(step))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    with torch.no_grad():
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "rng": RngState(), "meta": {"step": step}}


def save(run: Checkpointer, *steps: int, **options: Any) -> None:
    for step in steps:
        run.save(step, state(step), metrics={"loss": 1 / step}, **options).result()


def saved(path: Path, *steps: int, **options: Any) -> Path:
    with Checkpointer(path, **options) as run:
        save(run, *steps)
    return path


def rows(path: Path) -> list[tuple[int, str]]:
    return [(entry.step, entry.kind) for entry in Run(path).ls()]


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def weights(path: Path, step: int) -> torch.Tensor:
    return Run(path).load_tensors(step)["model.weight"]


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_what_is_left_is_a_whole_checkpoint_of_the_modules(files: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 10, 20, 30, files=files, config={"width": 3}, assets={"config.json": b"{}"})
    Run(path).annotate(10, {"val": 0.5})
    before = {step: weights(path, step) for step in (10, 20)}
    with Run(path).open(10) as opened:
        manifest = opened.manifest
    nbytes = sum(entry.nbytes for entry in Run(path).ls())
    report = thin(path)
    assert [(one.step, one.name) for one in report.thinned] == [
        (10, "weights-step-00000010"),
        (20, "weights-step-00000020"),
    ]
    assert report.kept == {"step-00000030": "it is the newest"}
    assert rows(path) == [(10, "weights"), (20, "weights"), (30, "full")]
    run = Run(path)
    for step, tensor in before.items():
        assert run.verify(step, require="model") == []
        assert torch.equal(weights(path, step), tensor)
    with run.open(10) as opened:
        left = opened.manifest
        assert set(opened.trees) == {"model"}
    assert (left.attempt, left.parent, left.sequence) == (manifest.attempt, manifest.parent, manifest.sequence)
    assert left.created_unix_seconds == manifest.created_unix_seconds
    assert left.derived["dropped"] == ["optimizer", "rng", "meta"]
    assert run.ls()[0].metrics == {"loss": 0.1, "val": 0.5}
    assert run.config(10) == {"width": 3}
    assert run.assets(10) == {"config.json": b"{}"}
    assert not [file for file in (path / "weights-step-00000010").rglob("*") if "optimizer" in file.name]
    assert sum(one.freed_bytes for one in report.thinned) == nbytes - sum(entry.nbytes for entry in run.ls())
    assert not [entry for entry in run.ls() if entry.abandoned]
    with Checkpointer(path, files=files) as again:
        assert again.resume(state(0)) == 30
        save(again, 40)
    assert not [entry for entry in run.ls() if entry.abandoned or entry.damage]


def test_the_weights_are_linked_and_not_written(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 10, 20)
    file = "model-00001-of-00001.safetensors"
    inode = (path / "step-00000010" / file).stat().st_ino
    store = LocalStore(str(path))
    thin(path)
    if store.reflinks and Capability.LINKS in store.capabilities:
        assert (path / "weights-step-00000010" / file).stat().st_nlink == 1
    assert (path / "weights-step-00000010" / file).stat().st_ino == inode
    assert set(os.listdir(path / "weights-step-00000010")) == {
        file, "manifest.json", "model.safetensors.index.json", "state.json"
    }  # fmt: skip


def test_pinned_and_named_checkpoints_stay_whole(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        save(run, 10)
        save(run, 20, name="best")
        save(run, 30, 40, 50)
    Run(run.path).pin(30)
    report = thin(run.path, older_than=45)
    assert [one.step for one in report.thinned] == [10, 40]
    assert report.kept == {"step-00000020": "it has a name that moves (best)", "step-00000030": "it is pinned"}
    assert [step for step, kind in rows(Path(run.path)) if kind == "full"] == [20, 30, 50]


def test_one_that_is_read_stays_until_it_is_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 10, 20)
    with Run(path).open(10):
        report = thin(path)
        assert report.thinned == ()
        assert "being read" in report.kept["step-00000010"]
        assert rows(path) == [(10, "full"), (10, "weights"), (20, "full")]
    assert [one.name for one in thin(path).thinned] == ["weights-step-00000010"]
    assert rows(path) == [(10, "weights"), (20, "full")]


def test_one_without_modules_and_steps_that_are_not_there(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            run.save(step, {"w": torch.ones(3)}).result()
    assert "has no module" in thin(run.path).kept["step-00000001"]
    with pytest.raises(CheckpointNotFound, match="no usable full checkpoint of step 3"):
        thin(run.path, [1, 3])
    for wrong in ({"steps": [1], "older_than": 2}, {"older_than": -1}, {"steps": [True]}, {"older_than": 1.5}):
        with pytest.raises(InvalidOption):
            thin(run.path, **wrong)  # type: ignore[arg-type]


def test_where_the_newest_is_damaged_nothing_is_done(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 10, 20)
    shard = path / "step-00000020" / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="the newest, is damaged"):
        thin(path)
    assert rows(path) == [(10, "full"), (20, "full")]


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 10, 20, 30)
    assert (call("thin", path).exit_code, call("thin", path, "--optimizer", "7").exit_code) == (2, 3)
    result = call("thin", path, "--optimizer", "--older-than", "15", "--dry-run")
    assert "would thin out step-00000010" in result.stdout
    assert rows(path) == [(10, "full"), (20, "full"), (30, "full")]
    result = call("thin", path, "--optimizer", "--older-than", "15")
    assert "step-00000010 is weights-step-00000010 now" in result.stdout
    found = json.loads(call("thin", path, "--optimizer", "20", "30", "--json").stdout)
    assert [one["name"] for one in found["thinned"]] == ["weights-step-00000020"]
    assert found["kept"] == {"step-00000030": "it is the newest"}
    assert "thinned out" in call("ls", path).stdout
    with Checkpointer(path) as run:
        run.prepare(state(0))
        assert call("thin", path, "--optimizer").exit_code == 0  # nothing to do, so nothing is held
        save(run, 40)
        assert call("thin", path, "--optimizer").exit_code == 4


# -- by retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_retention_thins_milestones_out(files: Any, tmp_path: Path) -> None:
    events: list[Event] = []
    policies = [KeepLast(2), KeepEvery(2, weights_only=True)]
    with Checkpointer(tmp_path / "run", keep=policies, files=files, on_event=events.append) as run:
        save(run, *range(1, 8))
    path = Path(run.path)
    assert rows(path) == [(2, "weights"), (4, "weights"), (6, "full"), (7, "full")]
    assert [(e.step, e.left) for e in events if isinstance(e, ThinnedOut)] == [
        (2, "weights-step-00000002"),
        (4, "weights-step-00000004"),
    ]
    assert all(Run(path).verify_entry(entry) == [] for entry in Run(path).ls())
    with Checkpointer(tmp_path / "run", keep=policies, files=files) as run:
        assert run.resume(state(0)) == 7
        save(run, 8, 9)
    assert rows(path) == [(2, "weights"), (4, "weights"), (6, "weights"), (8, "full"), (9, "full")]
    assert call("prune", path, "--keep-last", "1").exit_code == 0
    assert rows(path) == [(6, "weights"), (9, "full")]


def test_a_weights_only_save_of_the_step_is_another_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", keep=[KeepLast(1), KeepEvery(2, weights_only=True)]) as run:
        save(run, 2, weights_only=True)
        save(run, 2, 3)
        assert run.prune() == []
    assert [entry.name for entry in Run(run.path).ls()] == [
        "weights-step-00000002", "weights-step-00000002+2", "step-00000003"
    ]  # fmt: skip


def test_a_step_that_was_thinned_out_is_saved(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", keep=[KeepLast(1), KeepEvery(2, weights_only=True)]) as run:
        save(run, 1, 2, 3)
        run.wait()  # retention comes after the save is acknowledged
        with pytest.raises(StepExists, match="already saved as weights-step-00000002"):
            run.save(2, state(2), weights_only=True)


def test_one_that_is_pinned_meanwhile_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pin_first(*arguments: Any) -> Any:
        Run(tmp_path / "run").pin(2)
        return thin_one(*arguments)

    monkeypatch.setattr(pruner, "thin", pin_first)
    with Checkpointer(tmp_path / "run", keep=[KeepLast(1), KeepEvery(2, weights_only=True)]) as run:
        save(run, 1, 2, 3)
        run.wait()
        assert (2, "full") in rows(tmp_path / "run")
        run.prune()
    assert rows(tmp_path / "run") == [(2, "full"), (2, "weights"), (3, "full")]


def test_what_cannot_be_thinned_out_is_kept_whole_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path / "run", keep=KeepEvery(2, weights_only=True)) as run:
        for step in range(1, 6):
            run.save(step, {"w": torch.full((3,), step)}).result()
    assert rows(Path(run.path)) == [(2, "full"), (4, "full"), (5, "full")]
    assert caplog.text.count("step-00000002 is kept whole") == 1


def test_a_storage_without_links_gets_copies(tmp_path: Path) -> None:
    store = MemoryStore()
    with Checkpointer(
        "memory://thin", keep=[KeepLast(1), KeepEvery(2, weights_only=True)], run=RunOptions(store=store)
    ) as run:
        save(run, 1, 2, 3)
    reading = Run("memory://thin", store=store)
    assert [(entry.step, entry.kind) for entry in reading.ls()] == [(2, "weights"), (3, "full")]
    assert reading.verify(2, require="model") == []


@pytest.mark.parametrize("dies", [False, True], ids=["error", "death"])
def test_wherever_it_is_struck_the_old_one_or_the_new_one_is_whole(dies: bool, tmp_path: Path) -> None:
    original = saved(tmp_path / "original", 10, 20, 30)

    def make(name: Path) -> Path:
        return Path(shutil.copytree(original, tmp_path / name))

    def act(store: LocalStore) -> None:
        with mock.patch("asyncckpt.run.open_store", return_value=store):
            thin(store.path)

    assert strike_everywhere(make, act, dies=dies) > 20
    for path in itertools.chain(tmp_path.glob("*-True"), tmp_path.glob("*-False")):
        assert {step for step, _ in rows(path)} == {10, 20, 30}
        thin(path)  # goes on where it was
        assert rows(path) == [(10, "weights"), (20, "weights"), (30, "full")]
        with Checkpointer(path) as run:  # the next writer tidies up
            assert run.resume(state(0)) == 30
        assert not list(path.glob(".tmp-*")) + list(path.glob(".trash-*"))


@pytest.mark.parametrize("dies", [False, True], ids=["error", "death"])
def test_wherever_retention_is_struck_the_old_one_or_the_new_one_is_whole(dies: bool, tmp_path: Path) -> None:
    original = saved(tmp_path / "original", 2, 3)

    def make(name: Path) -> Path:
        return Path(shutil.copytree(original, tmp_path / name))

    keep = [KeepLast(1), KeepEvery(2, weights_only=True)]

    def act(store: LocalStore) -> None:
        run = Checkpointer(store.path, keep=keep)
        run.prepare(state(0))
        run._store.ops = store.ops  # type: ignore[attr-defined]
        try:
            run.prune()
        finally:
            run._store.ops = type(store.ops).__mro__[2]()  # type: ignore[attr-defined]
            run.close()

    strike_everywhere(make, act, dies=dies)
    for path in itertools.chain(tmp_path.glob("*-True"), tmp_path.glob("*-False")):
        assert {step for step, _ in rows(path)} == {2, 3}
        with Checkpointer(path, keep=keep) as run:
            assert run.resume(state(0)) == 3
            run.prune()
        assert rows(path) == [(2, "weights"), (3, "full")]


def test_a_strike_is_noticed() -> None:
    """The two tests above would be worth nothing if the disk never refused."""
    ops = StruckOps(1, dies=True)
    with pytest.raises(Gone):
        ops.mkdir("/nowhere")
    assert ops.struck
