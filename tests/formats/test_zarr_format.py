"""The zarr format: other libraries read exactly the bits that were saved, and nothing of it can change unseen."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from conftest import bits
from hypothesis import example, given
from hypothesis import strategies as st
from support.examples import examples
from support.options import by_stage
from torch import nn

from asyncckpt import CheckpointDamaged, Checkpointer, Run, Zarr
from asyncckpt.formats.zarr import node_names
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import Manifest
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.storage.local import LocalStore

zarr = pytest.importorskip("zarr", minversion="3.1")
tensorstore = pytest.importorskip("tensorstore")

from asyncckpt.integrations import zarr_dtypes  # noqa: E402
from asyncckpt.integrations.zarr_store import open_group  # noqa: E402


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


def _zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}


def _manifest(path: Path, step: int = 1) -> Manifest:
    with Run(path).open(step) as checkpoint:
        return checkpoint.manifest


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
            live = _zeros(state)
            run.restore(live, 1)
            assert bits(live) == bits(state)
        listed = {record.name for record in _manifest(path.parent).files}
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
        live = _zeros({"t": tensor})
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


# -- damage ------------------------------------------------------------------------------------------------------------


def _swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _index(shard: Path) -> list[int]:
    """The shard's index: offset and size of each of its 16 chunks."""
    return list(struct.unpack("<32Q", shard.read_bytes()[-260:-4]))


def _write_index(shard: Path, numbers: list[int]) -> None:
    """With the crc32c that it needs: zarr has nothing to complain about."""
    body = struct.pack("<32Q", *numbers)
    shard.write_bytes(shard.read_bytes()[:-260] + body + struct.pack("<I", google_crc32c.value(body)))


def _swap_chunks(shard: Path) -> None:
    data, index = bytearray(shard.read_bytes()), _index(shard)
    assert index[1] == index[3]
    one, other = slice(index[0], index[0] + index[1]), slice(index[2], index[2] + index[3])
    data[one], data[other] = data[other], data[one]
    shard.write_bytes(data)


def _swap_entries(shard: Path) -> None:
    index = _index(shard)
    _write_index(shard, index[2:4] + index[:2] + index[4:])


def _drop_entry(shard: Path) -> None:
    _write_index(shard, [(1 << 64) - 1] * 2 + _index(shard)[2:])


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


SHARD = "sharded/value/c.0.0"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "edited metadata": lambda p: _edit(p / "one/value/zarr.json", "float32", "uint32 "),
    "another fill value": lambda p: _edit(p / "one/value/zarr.json", '"fill_value": 0.0', '"fill_value": 1.0'),
    "edited group metadata": lambda p: _edit(p / "one/zarr.json", '"zarr_format": 3', '"zarr_format": 2'),
    "deleted metadata": lambda p: (p / "one/value/zarr.json").unlink(),
    "deleted root metadata": lambda p: (p / "zarr.json").unlink(),
    "deleted chunk": lambda p: (p / "one/value/c.0.0").unlink(),
    "deleted shard": lambda p: (p / SHARD).unlink(),
    "deleted array": lambda p: shutil.rmtree(p / "one/value"),
    "swapped chunk files": lambda p: _swap(p / "one/value/c.0.0", p / "other/value/c.0.0"),
    "swapped arrays": lambda p: (
        (p / "one").rename(p / "x"),
        (p / "other").rename(p / "one"),
        (p / "x").rename(p / "other"),
    ),
    "swapped chunks": lambda p: _swap_chunks(p / SHARD),
    "swapped index entries": lambda p: _swap_entries(p / SHARD),
    "index entry gone": lambda p: _drop_entry(p / SHARD),
    "edited index": lambda p: (p / SHARD).write_bytes(
        (p / SHARD).read_bytes()[:-9] + b"\1" + (p / SHARD).read_bytes()[-8:]
    ),
    "cut shard": lambda p: os.truncate(p / SHARD, (p / SHARD).stat().st_size - 1),
    "half a shard": lambda p: os.truncate(p / SHARD, (p / SHARD).stat().st_size // 2),
    "shard without its index": lambda p: os.truncate(p / SHARD, (p / SHARD).stat().st_size - 260),
    "longer shard": lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes() + bytes(4)),
    "an array more": lambda p: shutil.copytree(p / "one/value", p / "one/extra"),
    "a chunk more": lambda p: shutil.copy(p / "one/value/c.0.0", p / "one/value/c.1.0"),
    "shard is a link": lambda p: ((p / SHARD).rename(p.parent / "moved"), (p / SHARD).symlink_to(p.parent / "moved")),
    "folder is a link": lambda p: ((p / "one").rename(p.parent / "moved"), (p / "one").symlink_to(p.parent / "moved")),
}


@pytest.mark.parametrize("codec", ["none", "zstd", "planes"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_seen_and_restored_from_never(damage: Callable[[Path], object], codec: str, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(7)
    state = {
        "one": torch.randn(31, 32, generator=random),
        "other": torch.randn(31, 32, generator=random),
        "sharded": torch.randn(512, 32, generator=random)
        if codec != "zstd"
        else torch.arange(512 * 32.0).view(512, 32),
    }
    with Checkpointer(tmp_path / "run", files=Zarr(codec=codec, chunk_bytes=4096)) as run:
        path = Path(run.save(1, state).result().path)
    assert (path / SHARD).stat().st_size > 260
    if codec == "zstd" and damage is DAMAGES["swapped chunks"]:
        first, second = _manifest(path.parent).components["sharded"].tensors["value"].parts[0].extents[:2]
        record = next(record for record in _manifest(path.parent).files if record.name == SHARD)
        if record.extents[first].payload_bytes != record.extents[second].payload_bytes:
            pytest.skip("these frames differ in size")
    damage(path)
    run = Run(tmp_path / "run")
    assert run.verify(1)
    live = _zeros(state)
    with pytest.raises(CheckpointDamaged):
        run.restore(live, 1)
    with pytest.raises(CheckpointDamaged):
        run.load_tensors(1)
    with contextlib.closing(LocalStore(str(path.parent)).open(path.name)) as reader, pytest.raises(CheckpointDamaged):
        group = open_group(open_checkpoint(reader))
        for name in state:
            group[name]["value"][...]


def test_what_a_restore_does_not_touch_does_not_stop_it(tmp_path: Path) -> None:
    state = {"one": torch.randn(31, 32), "other": torch.randn(31, 32), "sharded": torch.randn(512, 32)}
    with Checkpointer(tmp_path / "run", files=Zarr(chunk_bytes=4096)) as run:
        path = Path(run.save(1, state).result().path)
        _swap_chunks(path / SHARD)
        live = {"other": torch.zeros(31, 32)}
        run.restore(live, 1)
        assert bits(live["other"]) == bits(state["other"])
        assert bits(run.load_tensors(1, ["one"])) == bits({"one.value": state["one"]})
        assert run.verify(1)


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_an_index_says_which_chunks_are_past_the_edge(codec: str, tmp_path: Path) -> None:
    """Five chunks in shards of two: what is not there must not look like a chunk."""
    state = {"t": torch.randn(5, 1024)}
    with Checkpointer(tmp_path / "run", files=Zarr(codec=codec, chunk_bytes=4096, shard_bytes=8192)) as run:
        path = Path(run.save(1, state).result().path)
    sizes = {}
    for shard in sorted((path / "t" / "value").glob("c.*")):
        body, crc = shard.read_bytes()[-36:-4], shard.read_bytes()[-4:]
        assert struct.pack("<I", google_crc32c.value(body)) == crc
        sizes[shard.name] = struct.unpack("<4Q", body)[1::2]
        assert struct.unpack("<4Q", body)[0] % 4096 == 0
    there, absent = 4096 + (16 if codec == "planes" else 0), (1 << 64) - 1
    assert sizes == {"c.0.0": (there, there), "c.1.0": (there, there), "c.2.0": (there, absent)}
    assert (path / "t/value/c.2.0").read_bytes()[-20:-4] == b"\xff" * 16


def _resealed(path: Path, file: str) -> None:
    """Make the manifest say that ``file`` has the bytes that it has: what only a hostile or broken writer does."""
    from asyncckpt.codecs import digests

    data, content = (path / "manifest.json").read_bytes(), (path / file).read_bytes()
    body = json.loads(data)
    digest = digests.get(body["digest"])
    for record in body["files"]:
        if record["name"] == file:
            assert record["nbytes"] == len(content)
            for extent in record["extents"]:
                extent[2] = digest(content[extent[0] : extent[0] + extent[1]])
    del body["manifest_digest"]
    (path / "manifest.json").write_bytes(manifests.seal(json.dumps(body).encode()[:-1]))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (
            "one/value/zarr.json",
            lambda p: _edit(p / "one/value/zarr.json", '"data_type": "float32"', '"data_type":   "int32"'),
        ),
        ("one/value/zarr.json", lambda p: _edit(p / "one/value/zarr.json", "  31,\n", "  32,\n")),
        (
            "one/value/zarr.json",
            lambda p: _edit(p / "one/value/zarr.json", '"node_type": "array"', '"node_type": "group"'),
        ),
        ("one/value/zarr.json", lambda p: _edit(p / "one/value/zarr.json", "{\n", "[\n")),
        (SHARD, lambda p: _swap_entries(p / SHARD)),
        (SHARD, lambda p: _drop_entry(p / SHARD)),
    ],
    ids=["dtype", "shape", "group", "no JSON", "swapped index entries", "index entry gone"],
)
def test_metadata_that_says_other_than_the_manifest_is_damage(
    file: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    """Other tools read the one, this library the other: both must be one checkpoint."""
    state = {"one": torch.randn(31, 32), "sharded": torch.randn(512, 32)}
    with Checkpointer(tmp_path / "run", files=Zarr(chunk_bytes=4096)) as run:
        path = Path(run.save(1, state).result().path)
    _resealed(path, file)
    assert Run(tmp_path / "run").verify(1) == [], "sealing alone is no damage"
    damage(path)
    _resealed(path, file)
    found = Run(tmp_path / "run").verify(1)
    assert found
    assert all("digest" not in entry.problem for entry in found)


def test_equal_metadata_is_one_file_and_copies_of_it_are_as_good(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    with Checkpointer(tmp_path / "run", files=Zarr()) as run:
        path = Path(run.save(1, {"model": model}).result().path)
    copied = shutil.copytree(path.parent, tmp_path / "copied")
    assert Run(copied).verify(1) == []
    assert len(list((path / "model").glob("*/zarr.json"))) == 12
