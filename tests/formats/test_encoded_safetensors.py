"""Encoded safetensors shards: valid files for any reader, exact tensors for this one."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support.examples import examples
from support.options import by_stage
from torch import nn

from asyncckpt import Checkpointer, InvalidOption, Run, Safetensors
from asyncckpt.codecs import codecs
from asyncckpt.convert.single_file import export
from asyncckpt.manifest.records import ChunkedRecord, Manifest
from asyncckpt.protocols import Codec
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.storage.posix import PosixOps

CODECS = ["planes", "zstd", "lz4"]
every_codec = pytest.mark.parametrize("codec", CODECS)
#: From here on tensors are encoded.
ENCODED_BYTES = 64 << 10
#: Memory in which nothing has to give way: chunks then lie in order.
PLENTY = 64 << 20


def _any_bits(code: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    dtype, count = DTYPES[code], math.prod(shape)
    random = np.random.default_rng(seed)
    if dtype is torch.bool:
        return torch.from_numpy(random.integers(0, 2, count).astype(bool)).reshape(shape)
    raw = random.integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


class Named(nn.Module):
    """Tensors of any name."""

    def __init__(self, made: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._buffers.update(made)


def _made() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embed.weight": torch.randn(300, 200, generator=generator),
        "half": torch.randn(70_000, generator=generator).to(torch.bfloat16),
        "index": torch.arange(30_000),
        "just.over": torch.zeros(ENCODED_BYTES, dtype=torch.uint8),
        "just.under": torch.zeros(ENCODED_BYTES - 1, dtype=torch.uint8),
        "bias": torch.randn(200, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
    }


def _manifest(path: Path, step: int = 1) -> Manifest:
    with Run(path.parent).open(step) as checkpoint:
        return checkpoint.manifest


def _save(path: Path, state: dict[str, Any], codec: str | Codec, **options: Any) -> Path:
    options = {"extent_bytes": 32 << 10, "staging_bytes": PLENTY} | options
    with Checkpointer(path, **by_stage(codec=codec, incremental=False, **options)) as run:
        return Path(run.save(1, state).result().path)


@every_codec
def test_shards_are_valid_files_that_say_what_they_are(codec: str, tmp_path: Path) -> None:
    made = _made()
    path = _save(tmp_path / "run", {"model": Named(made)}, codec)
    encoded: dict[str, int] = {}
    plain: dict[str, torch.Tensor] = {}
    tensors = _manifest(path).components["model"].tensors
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            names, metadata = list(shard.keys()), shard.metadata()
            if metadata == {"format": "pt"}:
                plain |= {name: shard.get_tensor(name) for name in names}
                continue
            assert metadata["format"] == "asyncckpt-chunks"
            how = json.loads(metadata["asyncckpt"])
            assert how["codec"] == codec
            for tensor, described in how["tensors"].items():
                original = made[tensor]
                assert described["shape"] == list(original.shape)
                assert DTYPES[described["dtype"]] is original.dtype
                # what is in the file is enough to have the tensor back, without the manifest
                data = b""
                for number, stored in enumerate(described["frames"]):
                    chunk = shard.get_tensor(f"{tensor}#{number}")
                    assert chunk.dtype is torch.uint8
                    assert chunk.numel() % 4096 == 0
                    size = min(described["chunk_bytes"], original.nbytes - len(data))
                    out = np.empty(size, np.uint8)
                    codecs.get(how["codec"], how["options"]).decode(chunk.numpy()[:stored], out)
                    assert not chunk[stored:].any(), "what pads a frame is zeros"
                    data += out.tobytes()
                assert data == bits(original)[2]
                encoded[tensor] = len(described["frames"])
            assert sorted(names) == sorted(f"{t}#{i}" for t in how["tensors"] for i in range(encoded[t]))
    assert bits(plain) == bits({name: t for name, t in made.items() if t.nbytes < ENCODED_BYTES})
    assert encoded == {name: -(-t.nbytes // (32 << 10)) for name, t in made.items() if t.nbytes >= ENCODED_BYTES}
    assert not list(path.glob("*.index.json")), "loaders that follow an index would take chunks for tensors"
    assert all(isinstance(tensors[name], ChunkedRecord) == (name in encoded) for name in tensors)


def test_without_large_tensors_nothing_is_different(tmp_path: Path) -> None:
    state = {"model": nn.Linear(20, 30)}
    path = _save(tmp_path / "run", state, "planes")
    assert [file.name for file in sorted(path.glob("*.safetensors"))] == ["model-00001-of-00001.safetensors"]
    assert (path / "model.safetensors.index.json").exists()
    assert bits(load_file(path / "model-00001-of-00001.safetensors")) == bits(dict(state["model"].state_dict()))


@pytest.mark.parametrize("code", sorted(DTYPES))
@every_codec
def test_every_dtype_comes_back(codec: str, code: str, tmp_path: Path) -> None:
    state = {"t": _any_bits(code, (3, 131, 257), 2)}
    path = _save(tmp_path / "run", state, codec, extent_bytes=20 << 10)
    live = {"t": torch.zeros_like(state["t"])}
    run = Run(tmp_path / "run")
    assert run.verify(1) == []
    run.restore(live, 1)
    assert bits(live) == bits(state)
    view = torch.zeros(3, 257, 131, dtype=state["t"].dtype).transpose(1, 2)
    run.restore({"t": view}, 1)
    assert bits(view) == bits(state["t"]), "into memory in another order"
    [tensor] = _manifest(path).components["t"].tensors.values()
    assert isinstance(tensor, ChunkedRecord)


@examples(30)
@given(
    shapes=st.lists(
        st.lists(st.sampled_from([1, 3, 64, 257, 1031]), min_size=1, max_size=3).filter(
            lambda s: math.prod(s) < 120_000
        ),
        min_size=1,
        max_size=5,
    ),
    code=st.sampled_from(sorted(DTYPES)),
    codec=st.sampled_from([*CODECS, "blosc", "auto"]),
    extents=st.sampled_from([1, 3, 8, 64]),
    shard_bytes=st.sampled_from([1, 70_000, 1 << 20]),
)
def test_any_shapes_come_back(
    shapes: list[list[int]],
    code: str,
    codec: str,
    extents: int,
    shard_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = {f"t{number}": _any_bits(code, tuple(shape), number) for number, shape in enumerate(shapes)}
    path = _save(
        tmp_path_factory.mktemp("any") / "run",
        {"model": Named(made)},
        codec,
        extent_bytes=4096 * extents,
        shard_bytes=shard_bytes,
    )
    run = Run(path.parent)
    assert run.verify(1) == []
    assert bits(run.load_tensors(1)) == bits({f"model.{name}": tensor for name, tensor in made.items()})


@every_codec
def test_an_export_is_a_plain_file(codec: str, tmp_path: Path) -> None:
    made = _made()
    path = _save(tmp_path / "run", {"model": Named(made), "step": 3}, codec)
    out = tmp_path / "out.safetensors"
    with contextlib.closing(Run(path.parent).open(1)) as reader:
        export(reader, out)
    assert bits(load_file(out)) == bits(made)
    with safe_open(out, "pt") as file:
        assert file.metadata()["format"] == "pt"


class CountedReads(PosixOps):
    """Which bytes of which files are read through aligned buffers."""

    def __init__(self) -> None:
        self.by_path: dict[str, int] = {}
        self.paths: dict[int, str] = {}

    def preadv(self, fd: int, buffer: Any, offset: int) -> int:
        got = super().preadv(fd, buffer, offset)
        path = Path(f"/proc/self/fd/{fd}").readlink().name
        self.by_path[path] = self.by_path.get(path, 0) + got
        return got


@every_codec
def test_one_tensor_is_read_alone(codec: str, tmp_path: Path) -> None:
    made = _made()
    path = _save(tmp_path / "run", {"model": Named(made)}, codec)
    manifest = _manifest(path)
    files = {record.name: record for record in manifest.files}
    run = Run(tmp_path / "run")
    run._store.ops = ops = CountedReads()
    found = run.load_tensors(1, ["model.half"])
    assert bits(found) == bits({"model.half": made["half"]})
    tensor = manifest.components["model"].tensors["half"]
    assert isinstance(tensor, ChunkedRecord)
    [part] = tensor.parts
    assert ops.by_path == {part.file: sum(files[part.file].extents[number].nbytes for number in part.extents)}
    assert ops.by_path[part.file] < files[part.file].nbytes / 2
    # damage to another tensor of the same shard does not concern it
    other = manifest.components["model"].tensors["embed.weight"]
    assert isinstance(other, ChunkedRecord)
    assert other.parts[0].file == part.file
    extent = files[part.file].extents[other.parts[0].extents[0]]
    data = bytearray((path / part.file).read_bytes())
    data[extent.offset + 100] ^= 1
    (path / part.file).write_bytes(data)
    assert bits(run.load_tensors(1, ["model.half"])) == bits(found)
    assert [(entry.file, entry.offset) for entry in run.verify(1)] == [(part.file, extent.offset)]


@pytest.mark.parametrize(
    "codec",
    ["none", "planes", "zstd", "lz4", "blosc", codecs.Zstd(level=5), codecs.Blosc(cname="lz4hc", shuffle="shuffle")],
    ids=str,
)
@pytest.mark.parametrize("shard_format", ["safetensors", "zarr"])
def test_the_same_state_gives_the_same_files(shard_format: str, codec: str | Codec, tmp_path: Path) -> None:
    first = _save(tmp_path / "one", {"model": Named(_made())}, codec, format=shard_format)
    reversed_order = dict(reversed(_made().items()))
    second = _save(tmp_path / "two", {"model": Named(reversed_order)}, codec, format=shard_format)

    def contents(path: Path) -> dict[str, bytes]:
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    assert contents(first) == contents(second)
    assert len(contents(first)) > 2


@every_codec
def test_what_cannot_be_compressed_costs_next_to_nothing(codec: str, tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 2**32, 1 << 20, dtype=np.uint32)).view(torch.int32)
    path = _save(tmp_path / "run", {"t": noise}, codec, extent_bytes=1 << 20)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size <= noise.nbytes + 4096 * 5


def test_what_can_be_compressed_is(tmp_path: Path) -> None:
    weights = torch.randn(1 << 20)
    for dtype, most in ((torch.float32, 0.89), (torch.bfloat16, 0.72)):
        tensor = weights.to(dtype)
        path = _save(tmp_path / str(dtype), {"t": tensor}, "planes", extent_bytes=1 << 20)
        assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < most * tensor.nbytes


@every_codec
def test_a_name_that_a_chunk_would_have_is_refused(codec: str, tmp_path: Path) -> None:
    large = torch.zeros(40_000)
    with Checkpointer(tmp_path / "run", files=Safetensors(codec=codec)) as run:
        with pytest.raises(InvalidOption, match="w#0"):
            run.save(1, {"model": Named({"w": large, "w#0": large.clone()})})
        run.save(1, {"model": Named({"w": large, "w#1": large.clone()})}).result()
        assert run.verify(1) == []
    with Checkpointer(tmp_path / "none") as run:
        run.save(1, {"model": Named({"w": large, "w#0": large.clone()})}).result()


def test_metadata_that_looks_like_ours_is_a_tensor_name_like_any_other(tmp_path: Path) -> None:
    made = {"#0": torch.arange(20_000), "a#b": torch.arange(20_000), "__metadata": torch.arange(20_000)}
    path = _save(tmp_path / "run", {"model": Named(made)}, "planes")
    assert Run(path.parent).verify(1) == []
    assert bits(Run(path.parent).load_tensors(1)) == bits({f"model.{name}": t for name, t in made.items()})
