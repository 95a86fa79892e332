"""Forged content under a manifest whose digests are right: views, plain values and names made to do harm."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from fuzz_checkpoints import Checkpoint, MemoryReader, checkpoint, live_state

from asyncckpt import CheckpointDamaged, InvalidOption, jsontree
from asyncckpt.codecs import digests
from asyncckpt.convert.single_file import export
from asyncckpt.formats import zarr
from asyncckpt.formats.safetensors import image
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.records import ChunkedRecord
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.read.verify import verify
from asyncckpt.restore import restore
from asyncckpt.storage.lease import LEASE_FILE, parse_holder, read_holder
from asyncckpt.types import TensorSpec

SECONDS = 20.0


def _with_header(source: Checkpoint, change: Any) -> MemoryReader:
    name = next(n for n in source.files if n.startswith("big") and n.endswith(".safetensors"))
    old = source.files[name]
    length = int.from_bytes(old[:8], "little")
    header = json.loads(old[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    assert len(text) <= length, "the forged header must fit where the old one was"
    return source.with_file(name, old[:8] + text.ljust(length) + old[8 + length :])


@pytest.mark.parametrize(
    "metadata",
    [None, [], {}, {"asyncckpt": 3}, {"asyncckpt": "[" * 1500}, {"asyncckpt": "[]"}, {"asyncckpt": '{"tensors":[1]}'}],
    ids=repr,
)
def test_a_shard_whose_header_describes_no_chunks_is_damage_and_no_crash(metadata: Any) -> None:
    def change(header: dict[str, Any]) -> None:
        header.pop("__metadata__")
        if metadata is not None:
            header["__metadata__"] = metadata

    assert [damage.file for damage in verify(_with_header(checkpoint("encoded"), change))]


def test_an_index_that_lists_chunks_the_manifest_does_not_is_damage() -> None:
    source = checkpoint("zarr")
    tensor = source.manifest.components["big"].tensors["value"]
    assert isinstance(tensor, ChunkedRecord)
    [part] = tensor.parts
    name, record = next((r.name, r) for r in source.manifest.files if r.name == part.file)
    places = [(e.offset, e.payload_bytes or e.nbytes) for e in (record.extents[i] for i in part.extents)]
    data = source.files[name]
    entries = (record.extents[-1].nbytes - 4) // 16
    assert zarr.encode_index(places, entries) == data[record.extents[-1].offset :], "the test knows where the index is"
    assert verify(source.with_file(name, data)) == []
    for wrong in (places[::-1], [(0, 1), *places[1:]], places[:-1]):
        forged = data[: record.extents[-1].offset] + zarr.encode_index(wrong, entries)
        assert "its index lists other chunks" in str(verify(source.with_file(name, forged)))


@pytest.mark.parametrize(
    ("component", "tree"),
    [
        ("optimizer", 3),
        ("optimizer", {"state": {}, "param_groups": [3]}),
        ("optimizer", {"state": {}, "param_groups": [{"lr": 1}]}),
        ("optimizer", {"state": {}, "param_groups": [{"params": 3}]}),
        ("optimizer", {"state": {}, "param_groups": [{"params": [[1]]}]}),
        ("optimizer", {"state": [], "param_groups": []}),
        ("model", [1]),
        ("model", "text"),
        ("plain", {"$": "tensor", "v": "not there"}),
    ],
    ids=repr,
)
def test_a_forged_state_of_the_wrong_form_is_damage_and_changes_nothing(component: str, tree: Any) -> None:
    source = checkpoint("plain")
    trees = json.loads(source.files["state.json"]) | {component: tree}
    live = live_state()
    with torch.no_grad():
        live["model"].weight.zero_()
    with pytest.raises(CheckpointDamaged):
        restore.restore(open_checkpoint(source.with_file("state.json", json.dumps(trees).encode())), live)
    assert not live["model"].weight.any()


def test_a_tree_cannot_ask_for_one_tensor_over_and_over() -> None:
    """Thirty characters each, and each would cost the tensor's memory."""
    source = checkpoint("plain")
    trees = json.loads(source.files["state.json"])
    trees["plain"] = [{"$": "tensor", "v": "7"}] * 3
    reader = source.with_file("state.json", json.dumps(trees).encode())
    with pytest.raises(CheckpointDamaged, match="twice"):
        restore.restore(open_checkpoint(reader), {"plain": {}})


def test_a_shape_that_torch_cannot_have_is_damage() -> None:
    source = checkpoint("plain")
    body = json.loads(source.body + b"}")
    body["components"]["big"]["tensors"] = {"value": ["F32", [0, 1 << 61, 1 << 61], body["files"][0]["name"], 0, 0]}
    reader = source.with_body(json.dumps(body).encode()[:-1])
    with pytest.raises(CheckpointDamaged, match="cannot be made"):
        restore.load_tensors(open_checkpoint(reader), ["big"])


@pytest.mark.parametrize("kind", ["set", "frozenset", "dict", "Counter"])
def test_keys_made_to_collide_are_refused_before_they_take_hours(kind: str) -> None:
    keys = [number * ((1 << 61) - 1) for number in range(100_000)]
    items = keys if "set" in kind else [item for key in keys for item in (key, 0)]
    began = time.process_time()
    with pytest.raises(CheckpointDamaged, match="collide"):
        jsontree.decode({"$": kind, "v": items}, lambda _name: torch.zeros(0))
    assert time.process_time() - began < SECONDS


def test_many_honest_keys_are_no_attack() -> None:
    keys = [*range(50_000), *(float(i) + 0.5 for i in range(50_000)), *map(str, range(50_000))]
    assert jsontree.decode({"$": "set", "v": keys}, lambda _name: torch.zeros(0)) == set(keys)


@pytest.mark.parametrize("name", ["\ud800", "__metadata__"])
def test_a_name_that_safetensors_cannot_hold_is_no_traceback_in_export(name: str, tmp_path: Path) -> None:
    source = checkpoint("plain")
    body = json.loads(source.body + b"}")
    tensors = body["components"]["model"]["tensors"]
    tensors[name] = tensors.pop("weight")
    reader = source.with_body(json.dumps(body).encode()[:-1])
    with pytest.raises(InvalidOption, match="no room for the name"):
        export(open_checkpoint(reader), tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    assert export(open_checkpoint(reader), tmp_path / "out.pt") > 0


def _many(n: int) -> MemoryReader:
    """``n`` components of one tensor in a shard of its own, each with an alias."""
    files: dict[str, bytes] = {"state.json": b"{}\n"}
    components = {}
    header, [begin], size = image([TensorSpec("t", "F32", (1,), 4)])
    data = header + bytes(4)
    for i in range(n):
        files[f"f{i}.safetensors"] = data
        tensors = {"t": ["F32", [1], f"f{i}.safetensors", begin, size]}
        components[f"c{i}"] = {"kind": "module", "tensors": tensors, "aliases": {"a": "t"}}
    body = json.loads(checkpoint("plain").body + b"}")
    digest = digests.get(body["digest"])
    known = digest(data)
    body["files"] = [
        {"name": name, "nbytes": len(d), "extents": [[0, len(d), known if d is data else digest(d)]]}
        for name, d in files.items()
    ]
    body["components"] = components
    return MemoryReader({**files, manifest.FILE_NAME: manifest.seal(json.dumps(body).encode()[:-1])})


def test_ten_thousand_shards_are_verified_and_exported_in_time_linear_in_their_number(tmp_path: Path) -> None:
    reader = _many(10_000)
    began = time.process_time()
    assert verify(reader) == []
    assert export(open_checkpoint(reader), tmp_path / "out.safetensors") > 0
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"pid":Infinity}', b"\xff", b"", b"null", b'{"owner":1}', b"9" * 5000], ids=repr
)
def test_a_lease_record_that_is_none_names_no_holder(content: bytes, tmp_path: Path) -> None:
    assert parse_holder(content) is None
    (tmp_path / LEASE_FILE).write_bytes(content)
    assert read_holder(str(tmp_path)) is None
