"""Chunks split into planes where their tensor is: the same operations on any device, here on the CPU, as if it paid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from conftest import bits
from support.options import by_stage

from asyncckpt import Checkpointer, Zarr
from asyncckpt.integrations import zarr_dtypes
from asyncckpt.stage import job as staging


def _state(device: str = "cpu") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "fp32": torch.randn(307, 211, device=device),
        "bf16": torch.randn(501, 103, device=device).to(torch.bfloat16),
        "fp64": torch.randn(97, 53, 3, device=device, dtype=torch.float64),
        "complex": torch.randn(4000, device=device, dtype=torch.complex64),
        "noise": torch.randint(0, 1 << 31, (20_000,), device=device, dtype=torch.int32) * 2 + 1,
        "tiny": torch.randn(5, device=device),
        "strided": torch.randn(150, 300, device=device).t(),
        "scalar": torch.tensor(3.5, device=device),
    }


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_DEVICES", {"cpu"})


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("codec", ["planes", "auto"])
@pytest.mark.parametrize("shard_format", ["safetensors", "zarr"])
def test_what_was_split_comes_back_bit_for_bit(shard_format: str, codec: str, tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=64 << 10)) as run:
        first = run.save(1, {"t": state}).result()
        second = run.save(2, {"t": state}).result()
        assert run.verify(1) == []
        loaded = run.load_tensors(2)
        assert second.written_bytes < first.nbytes / 5, "content digests of split chunks differ from save to save"
    for name, tensor in state.items():
        assert bits(loaded[f"t.{name}"]) == bits(tensor), name


@pytest.mark.usefixtures("on_device")
def test_both_readers_of_zarr_take_split_chunks(tmp_path: Path) -> None:
    zarr_dtypes.register()
    state = _state()
    with Checkpointer(tmp_path / "run", files=Zarr(codec="planes", chunk_bytes=64 << 10)) as run:
        run.save(1, {"t": state}).result()
    root = tmp_path / "run" / "step-00000001" / "t"
    for name, tensor in state.items():
        expected = bits(tensor)[-1]
        store = {"driver": "file", "path": f"{root / name}/"}
        by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result()
        assert np.ascontiguousarray(by_tensorstore).tobytes() == expected, name
        assert np.ascontiguousarray(zarr.open_array(root / name, mode="r")[...]).tobytes() == expected, name


@pytest.mark.usefixtures("on_device")
def test_it_is_the_same_file_as_split_by_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.randn(100_000)}
    sizes = []
    for name, devices in (("device", {"cpu"}), ("processor", set[str]())):
        monkeypatch.setattr(staging, "_DEVICES", devices)
        with Checkpointer(tmp_path / name, files=Zarr(codec="planes")) as run:
            run.save(1, state).result()
        sizes.append((tmp_path / name / "step-00000001/w/value/c.0").read_bytes())
    assert sizes[0] == sizes[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", ["planes", "auto", "none"])
def test_a_state_on_a_gpu_comes_back_bit_for_bit(codec: str, tmp_path: Path) -> None:
    state = _state("cuda")
    with Checkpointer(tmp_path / "run", files=Zarr(codec=codec, chunk_bytes=64 << 10)) as run:
        run.save(1, {"t": state}).result()
        assert run.verify(1) == []
        loaded = run.load_tensors(1)
    for name, tensor in state.items():
        assert bits(loaded[f"t.{name}"]) == bits(tensor.cpu()), name
