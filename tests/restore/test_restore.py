"""Restoring what is asked for, into what is there, and saying exactly what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, bits
from torch import nn

from asyncckpt import Checkpointer, CheckpointNotFound, KeepLast, Run, Safetensors, StateMismatch
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.manifest import environment
from asyncckpt.read import opening
from asyncckpt.storage.reader import LocalReader


@pytest.fixture
def saved(tmp_path: Path, tiny: Any) -> tuple[Run, nn.Module, Any]:
    model, optimizer = tiny
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=4096)) as run:
        run.save(1, {"model": model, "optimizer": optimizer, "big": torch.arange(100_000)}).result()
    return Run(tmp_path / "run"), model, optimizer


def test_all_differences_are_reported_together_and_nothing_is_changed(saved: Any) -> None:
    run, _, _ = saved
    other = Tiny()
    other.hidden = nn.Linear(16, 20)
    other.extra = nn.Linear(2, 2)
    del other.norm
    before = bits(other)
    with pytest.raises(StateMismatch) as caught:
        run.restore({"model": other, "absent": {}})
    error = caught.value
    assert set(error.missing) == {"model.extra.weight", "model.extra.bias", "absent"}
    assert {name.split(".")[1] for name in error.unexpected} == {"norm"}
    assert len(error.mismatched) == 2
    assert all("[16" in text and "[20" in text for text in error.mismatched)
    for name in (*error.missing, *error.unexpected):
        assert name in str(error)
    assert bits(other) == before


def test_not_strict_loads_what_fits_and_reports_the_rest(saved: Any) -> None:
    run, model, _ = saved
    other = Tiny()
    other.hidden = nn.Linear(16, 20)
    report = run.restore({"model": other}, strict=False)
    assert bits(other.embed.weight) == bits(model.embed.weight)
    assert len(report.mismatched) == 2


def test_prefix_filter_and_rename_map_for_a_changed_architecture(saved: Any) -> None:
    run, model, _ = saved

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.ModuleDict({"proj": nn.Linear(16, 16)})
            self.head = nn.Linear(16, 3)

    changed = Changed()
    head = bits(changed.head)
    run.restore(
        {"model": changed},
        include=["model.backbone."],
        rename={"model.hidden.": "model.backbone.proj."},
    )
    assert bits(changed.backbone["proj"]) == bits(model.hidden)
    assert bits(changed.head) == head
    renamed = nn.Linear(16, 16)
    run.restore(
        {"new": renamed},
        rename=lambda name: "new" + name.removeprefix("model.frozen") if name.startswith("model.frozen") else None,
    )
    assert bits(renamed) == bits(model.frozen)


def test_conversion_of_dtype_and_device_on_the_way(saved: Any) -> None:
    run, model, _ = saved
    half = Tiny().to(torch.bfloat16)
    with pytest.raises(StateMismatch, match=r"saved as torch.float32, live torch.bfloat16.*dtype="):
        run.restore({"model": half})
    run.restore({"model": half}, dtype=torch.bfloat16)
    assert bits(half.hidden.weight) == bits(model.hidden.weight.to(torch.bfloat16))
    assert half.norm.num_batches_tracked.dtype == torch.int64
    loaded = run.load_tensors(1, ["model.hidden"], dtype=torch.float64)
    assert set(loaded) == {"model.hidden.weight", "model.hidden.bias"}
    assert bits(loaded["model.hidden.bias"]) == bits(model.hidden.bias.double())


def test_a_module_on_the_meta_device_is_materialised(saved: Any) -> None:
    run, model, _ = saved
    with torch.device("meta"):
        empty = Tiny()
        empty.head.weight = empty.embed.weight
    run.restore({"model": empty}, device="cpu")
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())
    assert bits(empty) == bits(model)
    assert empty.head.weight is empty.embed.weight
    assert not empty.frozen.weight.requires_grad


def test_only_the_extents_that_are_asked_for_are_read(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = saved
    read: list[tuple[str, int]] = []
    original = LocalReader.read_into

    def spy(self: LocalReader, file: str, buffer: Any, nbytes: int, offset: int) -> int:
        read.append((file, nbytes))
        return original(self, file, buffer, nbytes, offset)

    monkeypatch.setattr(LocalReader, "read_into", spy)
    run.load_tensors(1, ["model.hidden.bias"])
    assert {file for file, _ in read} == {"model-00002-of-00002.safetensors"}
    assert 0 < sum(nbytes for _, nbytes in read) <= 4096
    read.clear()
    run.restore({"model": Tiny()})
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {file for file, _ in read} == shards, "the optimizer is not read for weights"


def test_an_optimizer_whose_groups_changed_is_named(saved: Any) -> None:
    run, _, _ = saved
    fresh = Tiny()
    regrouped = torch.optim.AdamW([{"params": fresh.embed.parameters()}, {"params": fresh.hidden.parameters()}])
    with pytest.raises(StateMismatch, match=r"1 param groups saved, 2 in the live"):
        run.restore({"model": fresh, "optimizer": regrouped})
    fewer = torch.optim.AdamW(fresh.hidden.parameters())
    with pytest.raises(StateMismatch) as caught:
        run.restore({"model": fresh, "optimizer": fewer})
    assert "optimizer.embed.weight" in caught.value.unexpected
    run.restore({"model": fresh, "optimizer": fewer}, strict=False)
    assert len(fewer.state) == 2


def test_a_component_of_another_kind_is_named(saved: Any) -> None:
    run, _, _ = saved
    with pytest.raises(StateMismatch, match="saved as tensor, live as plain"):
        run.restore({"big": {"a": 1}})


def test_optimizer_state_appears_on_a_fresh_optimizer_without_a_step(saved: Any) -> None:
    run, model, optimizer = saved
    fresh = Tiny()
    other = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=0.5)
    run.restore({"model": fresh, "optimizer": other})
    assert bits([fresh, other]) == bits([model, optimizer])


def test_arrays_come_back_on_the_host_wherever_tensors_go(tmp_path: Path) -> None:
    import numpy as np

    with Checkpointer(tmp_path / "run") as run:
        table = np.arange(50_000, dtype=np.float32)
        run.save(1, {"data": {"table": table, "small": np.arange(3)}}).result()
        state: dict[str, Any] = {"data": {}}
        run.restore(state, device="meta")  # stands for a GPU: nothing of an array may be made there
        assert (state["data"]["table"] == table).all()
        assert state["data"]["small"].tolist() == [0, 1, 2]


def test_extra_state_may_hold_tensors(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.amax = torch.zeros(3)

        def get_extra_state(self) -> Any:
            return {"amax": self.amax, "recipe": ("delayed", 3)}

        def set_extra_state(self, state: Any) -> None:
            self.amax = state["amax"]
            assert state["recipe"] == ("delayed", 3)

    module = nn.Sequential(Scaled())
    module[0].amax = torch.tensor([1.0, 2.0, 3.0])
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": module}).result()
        fresh = nn.Sequential(Scaled())
        run.restore({"model": fresh})
        assert fresh[0].amax.tolist() == [1.0, 2.0, 3.0]


def _saved_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Checkpointer, Run]:
    """A writer that keeps one checkpoint saves step 2 whenever a reader has found step 1 to be the newest."""
    writer = Checkpointer(tmp_path / "run", keep=KeepLast(1))
    writer.save(1, {"w": torch.full((9,), 1)}).result()
    run = Run(tmp_path / "run")
    listed = Catalog.newest

    def newest(catalog: Catalog, *args: Any) -> Any:
        found = listed(catalog, *args)
        if found.step == 1:
            writer.save(2, {"w": torch.full((9,), 2)}).result()
            writer.wait()
        return found

    monkeypatch.setattr(Catalog, "newest", newest)
    return writer, run


def test_verify_of_a_newest_that_is_deleted_before_it_is_opened_takes_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, run = _saved_meanwhile(tmp_path, monkeypatch)
    assert run.verify() == []
    assert [entry.step for entry in run.ls()] == [2]
    writer.close()


@pytest.mark.parametrize("use", ["load_tensors", "open"])
def test_a_newest_that_was_found_is_spared_until_it_has_been_read(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, run = _saved_meanwhile(tmp_path, monkeypatch)
    found = getattr(run, use)()
    if use == "load_tensors":
        assert found["w.value"].tolist() == [1] * 9
    else:
        assert found.path.endswith("step-00000001")
        assert found.trees
        found.close()
    writer.prune()
    assert [entry.step for entry in run.ls()] == [2]
    writer.close()


@pytest.mark.parametrize("use", ["load_tensors", "restore"])
def test_without_locks_a_newest_that_is_deleted_while_it_is_read_makes_way_for_the_newer_one(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path / "run") as writer:
        for step in (1, 2):
            writer.save(step, {"w": torch.full((9,), step)}).result()
    read = opening.OpenCheckpoint.check_small_files

    def deleted(checkpoint: opening.OpenCheckpoint) -> None:
        if checkpoint.manifest.step == 2:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
        read(checkpoint)

    monkeypatch.setattr(opening.OpenCheckpoint, "check_small_files", deleted)
    live = {"w": torch.zeros(9, dtype=torch.int64)}
    run = Run(tmp_path / "run")
    if use == "load_tensors":
        live["w"] = run.load_tensors()["w.value"]
    else:
        run.restore(live)
    assert live["w"].tolist() == [1] * 9


def test_a_step_is_found_without_reading_the_manifests_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path / "run") as writer:
        for step in (1, 2, 3):
            writer.save(step, {"w": torch.full((9,), step)}).result()
    run = Run(tmp_path / "run")
    opened: list[str] = []
    real = run._store.open

    def counted(name: str) -> Any:
        opened.append(name)
        return real(name)

    monkeypatch.setattr(run._store, "open", counted)
    assert run.load_tensors(2)["w.value"].tolist() == [2] * 9
    assert set(opened) == {"step-00000002"}
    with pytest.raises(CheckpointNotFound, match="the newest steps there: 1, 2, 3"):
        run.load_tensors(4)


def test_a_resume_says_where_versions_and_ranks_were_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": torch.ones(3)}
    then = {**environment.record(), "torch": "1.0.0", "host": "another"}
    with monkeypatch.context() as patch:
        patch.setattr(environment, "record", lambda: then)
        with Checkpointer(tmp_path / "run") as run:
            run.save(1, state).result()
    with Checkpointer(tmp_path / "run") as run:
        assert run.resume(dict(state)) == 1
        run.save(2, state).result()
    told = [record.message for record in caplog.records if "saved with" in record.message]
    assert told == [f"resumed step 1, which was saved with torch 1.0.0 (now {torch.__version__})"]
    with Checkpointer(tmp_path / "run") as run:
        assert run.restore(dict(state)).changed == ()
    assert environment.changes({"torch": str(torch.__version__)}, 8, 2) == ["8 ranks (now 2)"]
