"""Zarr v3 in and out: zarr-python and tensorstore open what goes out, and it comes in bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given
from support.examples import examples
from support.foreign import Holder, bits, exported, imported, module_bits, saved, tensor, tensors

from asyncckpt import CheckpointDamaged, UnsupportedValue
from asyncckpt.convert import zarr_groups


@given(tensors())
@examples(20)
def test_arrays_go_out_and_in_bit_for_bit(given: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = saved(Path(folder, "run"), {"model": Holder(given)})
        exported(run, Path(folder, "out.zarr"))
        back, _ = imported(Path(folder, "out.zarr"), Path(folder, "back"))
        assert module_bits(back) == bits(given)


def test_other_readers_open_it_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_groups, "_CHUNK_BYTES", 64)
    given = {"a.w": tensor(torch.float32, (7, 5, 3), 1), "b": tensor(torch.bfloat16, (30,), 2), "s": torch.tensor(3)}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    exported(run, tmp_path / "out", format="zarr")
    group = zarr.open_group(tmp_path / "out", mode="r")
    assert group.attrs["asyncckpt.step"] == "1"
    assert bits(given["a.w"])[2] == np.asarray(group["a.w"][:]).tobytes()
    for name in ("a.w", "b"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "out" / name)}}
        assert tensorstore.open(spec, open=True).result().read().result().tobytes() == bits(given[name])[2]
    back, _ = imported(tmp_path / "out", tmp_path / "back")
    assert module_bits(back) == bits(given)


def test_groups_of_others_come_in_with_compression_and_shards(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "in.zarr", mode="w", zarr_format=3)
    values = np.arange(60.0).reshape(12, 5)
    group.create_group("layer").create_array("w", data=values, chunks=(2, 5), shards=(4, 5))
    group.create_array("b", data=np.arange(6, dtype=">i4"), chunks=(4,))
    run, _ = imported(tmp_path / "in.zarr", tmp_path / "run")
    found = run.load(component="model")
    assert np.array_equal(found["layer.w"].numpy(), values)
    assert found["b"].tolist() == list(range(6))
    group.create_array("wide", data=np.arange(3, dtype=np.complex128), chunks=(2,))
    with pytest.raises(UnsupportedValue, match=r"wide"):
        imported(tmp_path / "in.zarr", tmp_path / "run2")
    (tmp_path / "in.zarr" / "zarr.json").write_text("no JSON")
    with pytest.raises(CheckpointDamaged):
        imported(tmp_path / "in.zarr", tmp_path / "run3")
