"""Export: files that other tools open, that appear whole or not at all, and never from bad bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny, bits, train
from safetensors.torch import load_file
from typer.testing import CliRunner

from asyncckpt import Checkpointer, InvalidOption, NotEnoughSpace, Run, RunPathError
from asyncckpt.cli.app import app
from asyncckpt.convert import single_file as exporting
from asyncckpt.convert.output import Output
from asyncckpt.storage.posix import PosixOps


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, Tiny]:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "progress": {"step": 30}, "table": np.arange(20_000.0)}
    with Checkpointer(tmp_path / "run") as run:
        run.save(30, state, metrics={"loss": 0.5}).result()
    return str(tmp_path / "run"), model


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def export(run: str, out: Path, **options: Any) -> int:
    with contextlib.closing(Run(run).open()) as reader:
        return exporting.export(reader, out, **options)


def test_safetensors_weights_open_in_their_own_reader_with_a_tied_tensor_once(saved: Any, tmp_path: Path) -> None:
    run, model = saved
    out = tmp_path / "weights.safetensors"
    assert call(run, "latest", out).exit_code == 0
    flat = load_file(out)
    assert flat.keys() == model.state_dict().keys() - {"head.weight"}
    assert all(bits(model.state_dict()[name]) == bits(tensor) for name, tensor in flat.items())
    data = out.read_bytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["format"] == "pt"


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_pt_weights_are_a_flat_state_dict_of_the_dtype_asked_for(
    saved: Any, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    run, model = saved
    out = tmp_path / "weights.pt"
    assert call(run, "30", out, "--dtype", name).exit_code == 0
    content = torch.load(out, weights_only=True)
    assert content["norm.num_batches_tracked"].dtype == torch.int64, "a counter was taken for a weight"
    fresh = Tiny().to(dtype)
    fresh.load_state_dict(content)
    assert bits(fresh.hidden.weight) == bits(model.hidden.weight.to(dtype))


def test_one_module_is_a_flat_state_dict_and_another_component_its_state(saved: Any, tmp_path: Path) -> None:
    run, model = saved
    assert call(run, "30", tmp_path / "m.pt", "--component", "model").exit_code == 0
    assert bits(torch.load(tmp_path / "m.pt", weights_only=True)) == bits(dict(model.state_dict()))
    assert call(run, "30", tmp_path / "o.pt", "--component", "optimizer").exit_code == 0
    assert "exp_avg" in torch.load(tmp_path / "o.pt", weights_only=True)["state"]["hidden.weight"]


def test_several_modules_do_not_overwrite_each_others_names(tmp_path: Path) -> None:
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model, "ema": ema}).result()
    export(str(tmp_path / "run"), tmp_path / "w.safetensors")
    flat = load_file(tmp_path / "w.safetensors")
    assert set(flat) == {"model.weight", "model.bias", "ema.weight", "ema.bias"}
    assert bits(flat["ema.weight"]) == bits(ema.weight)


def test_everything_is_there_and_arrays_keep_their_dtype(saved: Any, tmp_path: Path) -> None:
    run, model = saved
    out = tmp_path / "all.pt"
    assert call(run, "30", out, "--all", "--dtype", "bf16").exit_code == 0
    content = torch.load(out, weights_only=False)
    assert content["step"] == 30
    assert content["metrics"] == {"loss": 0.5}
    assert content["progress"] == {"step": 30}
    assert set(content["model"]) == set(model.state_dict())
    assert content["model"]["hidden.weight"].dtype == torch.bfloat16
    assert content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert "hidden.weight" in content["optimizer"]["param_groups"][0]["params"]
    assert np.array_equal(content["table"], np.arange(20_000.0))


def test_damage_is_refused_and_leaves_no_file(saved: Any, tmp_path: Path) -> None:
    run, _ = saved
    shard = Path(run, "step-00000030", "model-00002-of-00002.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for name in ("x.pt", "x.safetensors"):
        assert call(run, "30", tmp_path / name).exit_code == 1
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_nothing_is_overwritten_by_itself(
    saved: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved
    out = tmp_path / name
    out.write_text("mine")
    refused = call(run, "30", out)
    assert (refused.exit_code, out.read_text()) == (5, "mine")
    assert "--force" in refused.stderr
    assert call(run, "30", out, "--force").exit_code == 0
    out.unlink()
    publish = Output.publish

    def slow(self: Output, *, overwrite: bool) -> int:
        out.write_text("somebody else's")
        return publish(self, overwrite=overwrite)

    monkeypatch.setattr(Output, "publish", slow)
    assert call(run, "30", out).exit_code == 5
    assert out.read_text() == "somebody else's", "a file made meanwhile was overwritten"
    assert sorted(os.listdir(tmp_path)) == ["run", name], "the temporary file was left behind"


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_disk_that_refuses_is_a_typed_error_and_leaves_the_old_file(saved: Any, tmp_path: Path, name: str) -> None:
    run, _ = saved
    out = tmp_path / name
    out.write_text("old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NotEnoughSpace, match="the disk is full"):
            export(run, out, overwrite=True)
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["run", name]


def test_an_export_is_durable_before_it_has_its_name(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = saved
    log: list[str] = []
    fsync, rename = os.fsync, PosixOps.rename_noreplace

    def logged_fsync(fd: int) -> None:
        log.append(f"fsync {'dir' if os.path.isdir(f'/proc/self/fd/{fd}') else 'file'}")
        fsync(fd)

    def logged_rename(ops: Any, source: str, target: str) -> None:
        log.append("rename")
        rename(ops, source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(PosixOps, "rename_noreplace", logged_rename)
    export(run, tmp_path / "w.pt")
    assert log == ["fsync file", "rename", "fsync dir"]


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_the_file_mode_follows_the_umask(saved: Any, tmp_path: Path, name: str) -> None:
    before = os.umask(0o027)
    try:
        export(saved[0], tmp_path / name)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_exported_says_what_can(saved: Any, tmp_path: Path) -> None:
    run, _ = saved
    with pytest.raises(InvalidOption, match=r"\.pt"):
        export(run, tmp_path / "p.safetensors", what="progress")
    with pytest.raises(InvalidOption, match="components are model"):
        export(run, tmp_path / "p.pt", what="nope")
    with pytest.raises(RunPathError, match="does not exist"):
        export(run, tmp_path / "missing" / "p.pt")
    (tmp_path / "d.pt").mkdir()
    with pytest.raises(RunPathError, match="exists"):
        export(run, tmp_path / "d.pt", overwrite=True)
