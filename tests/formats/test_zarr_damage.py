"""Damage to a checkpoint in zarr is seen, and nothing is restored from it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
import torch
from conftest import bits
from support.zarr_files import manifest_of, to_fill
from torch import nn

from asyncckpt import CheckpointDamaged, Checkpointer, Run, Zarr
from asyncckpt.manifest import json as manifests
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.storage.local import LocalStore

zarr = pytest.importorskip("zarr", minversion="3.1")

from asyncckpt.integrations.zarr_store import open_group  # noqa: E402


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
        first, second = manifest_of(path.parent).components["sharded"].tensors["value"].parts[0].extents[:2]
        record = next(record for record in manifest_of(path.parent).files if record.name == SHARD)
        if record.extents[first].payload_bytes != record.extents[second].payload_bytes:
            pytest.skip("these frames differ in size")
    damage(path)
    run = Run(tmp_path / "run")
    assert run.verify(1)
    live = to_fill(state)
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
