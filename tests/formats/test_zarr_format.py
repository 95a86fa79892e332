"""Other libraries read the very bits of checkpoints in zarr, under names that any file system can hold."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits
from hypothesis import example, given
from hypothesis import strategies as st
from support.examples import examples
from support.options import by_stage
from support.zarr_files import manifest_of, to_fill
from torch import nn

from asyncckpt import Checkpointer, Zarr
from asyncckpt.formats.zarr import node_names
from asyncckpt.state.dtypes import DTYPES

zarr = pytest.importorskip("zarr", minversion="3.1")
tensorstore = pytest.importorskip("tensorstore")

from asyncckpt.integrations import zarr_dtypes  # noqa: E402


def _tensor(code: str, shape: tuple[int, ...], seed: int, content: str) -> torch.Tensor:
    """``bits``: any bit pattern, NaN payloads too; ``steps``: what a codec shrinks; ``zeros``: zarr's fill value."""
    dtype, count = DTYPES[code], math.prod(shape)
    random = np.random.default_rng(seed)
    if content == "zeros" or not count:
        return torch.zeros(shape, dtype=dtype)
    if content == "steps":
        return (torch.arange(count) % 3).to(dtype).reshape(shape)
    if dtype is torch.bool:
        return torch.from_numpy(random.integers(0, 2, count).astype(bool)).reshape(shape)
    raw = random.integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def _bytes(value: Any) -> bytes:
    return np.ascontiguousarray(value).tobytes()


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(bits(tensor)[2])


def _by_tensorstore(folder: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


# -- what others read --------------------------------------------------------------------------------------------------


SIZES = [0, 1, 2, 3, 4, 5, 7, 11, 13, 16, 31, 61, 127]
#: At most so many items in a tensor: many chunks of the smallest size, and still quick.
MOST = 40_000

shapes = st.lists(st.sampled_from(SIZES), max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= MOST)
tensors = st.builds(
    _tensor,
    st.sampled_from(sorted(DTYPES)),
    shapes | st.just((MOST,)) | st.just((127, 61, 5)) | st.just((3, 13, 7, 127)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["bits", "bits", "steps", "zeros"]),
)


@examples(70)
@given(
    made=st.lists(tensors, min_size=1, max_size=4),
    codec=st.sampled_from(["none", "planes", "zstd", "lz4"]),
    extents=st.sampled_from([1, 1, 2, 5, 16]),
    shard_bytes=st.sampled_from([1, 4096, 9000, 20_000, 70_000, 1 << 20]),
)
@example(made=[_tensor("F32", (127, 61, 5), 1, "bits")], codec="planes", extents=1, shard_bytes=20_000)
@example(made=[_tensor("BF16", (127, 127), 2, "steps")], codec="planes", extents=16, shard_bytes=9000)
@example(made=[_tensor("C64", (5, 61, 61), 3, "bits")], codec="none", extents=1, shard_bytes=70_000)
def test_other_libraries_read_the_very_bits(
    made: list[torch.Tensor], codec: str, extents: int, shard_bytes: int
) -> None:
    zarr_dtypes.register()
    state = {f"t{number}": tensor for number, tensor in enumerate(made)}
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"extent_bytes": 4096 * extents, "shard_bytes": shard_bytes, "incremental": False}
        with Checkpointer(f"{folder}/run", **by_stage(format="zarr", codec=codec, **options)) as run:
            path = Path(run.save(1, state).result().path)
            assert run.verify(1) == []
            live = to_fill(state)
            run.restore(live, 1)
            assert bits(live) == bits(state)
        listed = {record.name for record in manifest_of(path.parent).files}
        assert _files(path) == listed | {"manifest.json"}
        group = zarr.open_group(path, mode="r")
        for name, tensor in state.items():
            for array in (group[f"{name}/value"][...], _by_tensorstore(path / name / "value")):
                assert np.shape(array) == tuple(tensor.shape)
                assert str(np.asarray(array).dtype) == str(tensor.dtype).removeprefix("torch.")
                assert _bytes(array) == _raw(tensor)


@pytest.mark.parametrize("code", sorted(DTYPES))
@pytest.mark.parametrize("codec", ["none", "planes", "blosc", "auto"])
def test_every_dtype_in_shards_of_several_chunks(code: str, codec: str, tmp_path: Path) -> None:
    zarr_dtypes.register()
    tensor = _tensor(code, (6, 70, 100), 4, "bits")
    with Checkpointer(tmp_path / "run", files=Zarr(codec=codec, chunk_bytes=16 << 10, shard_bytes=40_000)) as run:
        path = Path(run.save(1, {"t": tensor}).result().path)
        assert run.verify(1) == []
        live = to_fill({"t": tensor})
        run.restore(live, 1)
    assert _raw(live["t"]) == _raw(tensor)
    assert _bytes(zarr.open_group(path, mode="r")["t/value"][...]) == _raw(tensor)
    assert _bytes(_by_tensorstore(path / "t" / "value")) == _raw(tensor)
    if tensor.element_size() > 1:
        assert len(list((path / "t" / "value").glob("c.*"))) > 1
    part = np.asarray(zarr.open_group(path, mode="r")["t/value"][2:5, 3:66:2, 7])
    assert _bytes(part) == _raw(tensor[2:5, 3:66:2, 7])


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized")
def test_the_whole_tree_is_a_zarr_hierarchy(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    with Checkpointer(tmp_path / "run", files=Zarr(codec="planes")) as run:
        path = Path(run.save(1, {"model": model, "optimizer": optimizer, "plain": 3}).result().path)
    group = zarr.open_group(path, mode="r")
    names = {name for name, _ in group.members(max_depth=None)}
    assert {f"model/{name}" for name in model.state_dict()} <= names
    assert "optimizer/state.0.weight.exp_avg" in names
    for name, tensor in model.state_dict().items():
        assert _bytes(group[f"model/{name}"][...]) == _raw(tensor)


# -- names -------------------------------------------------------------------------------------------------------------


NAMES = [
    "weight",
    "a.b.weight",
    "a/b",
    "a/b/c/d",
    "/",
    "..",
    ".",
    "../../up",
    "with space",
    " ",
    "größe",
    "名前.重み",
    "🙂",
    "Case",
    "case",
    "CASE",
    "cAsE.inner",
    "case.Inner",
    "STRASSE",
    "straße",
    "x" * 199,
    "x" * 200,
    "x" * 201,
    "x" * 2000,
    "x" * 2000 + "y",
    "X" * 2000,
    "ü" * 300,
    ".hidden",
    "__private",
    "_underscore",
    "-dash",
    "+plus",
    "zarr.json",
    "Zarr.JSON",
    "c",
    "c.0",
    "C",
    "c.0.0",
    "manifest.json",
    "=61",
    "a=b",
    "a%2Fb",
    "a\\b",
    'quote"',
    "line\nbreak",
    "\x7f",
    "\ud800",
    "0",
    "",
]


class Named(nn.Module):
    """Tensors of any name."""

    def __init__(self, made: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._buffers.update(made)


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_tensors_of_any_name_come_back(codec: str, tmp_path: Path) -> None:
    made = {name: torch.arange(5 + number) * 1000 + number for number, name in enumerate(NAMES)}
    with Checkpointer(tmp_path / "run", files=Zarr(codec=codec)) as run:
        path = Path(run.save(1, {"model": Named(made)}).result().path)
        assert run.verify(1) == []
        live = {name: torch.zeros_like(tensor) for name, tensor in made.items()}
        run.restore({"model": Named(live)}, 1)
    assert bits(live) == bits(made)
    found = {}
    for metadata in (path / "model").glob("*/zarr.json"):
        attributes = json.loads(metadata.read_text()).get("attributes", {})
        name = attributes.get("asyncckpt_name", metadata.parent.name)
        assert name not in found
        found[name] = _bytes(zarr.open_array(metadata.parent, mode="r")[...])
    assert found == {name: _raw(tensor) for name, tensor in made.items()}


@given(names=st.lists(st.text(max_size=6) | st.text("aA=./ü\0", max_size=4) | st.text(min_size=190), unique=True))
def test_node_names_are_distinct_on_any_file_system(names: list[str]) -> None:
    chosen = node_names(names)
    assert set(chosen) == set(names)
    assert len({node.casefold() for node in chosen.values()}) == len(names)
    for node in chosen.values():
        assert re.fullmatch(r"[A-Za-z0-9=][A-Za-z0-9._+=-]{0,254}", node)
        assert not node.startswith("__")
        assert node.casefold() != "zarr.json"
    assert node_names(reversed(names)) == chosen, "the order must not matter"
