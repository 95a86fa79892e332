"""Real checkpoints, made at run time and held in memory: where every fuzzer's seeds come from."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.options import by_stage

from asyncckpt import CheckpointDamaged, Checkpointer, Delta
from asyncckpt.codecs import digests
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import Manifest
from asyncckpt.types import Buffer

#: What is saved each way: no codec, encoded chunks, layers of differences, zarr with whole and with sharded arrays.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "encoded": {"codec": "planes", "extent_bytes": 64 << 10},
    "zstd": {"codec": "zstd", "extent_bytes": 64 << 10},
    "delta": {"codec": "planes", "delta": Delta(chain=2), "extent_bytes": 64 << 10},
    "zarr": {"format": "zarr", "codec": "lz4", "extent_bytes": 64 << 10},
    "zarr-raw": {"format": "zarr", "extent_bytes": 64 << 10},
}


class MemoryReader:
    """A ``Reader`` over bytes: what a parser is given is what the fuzzer made, and nothing waits for a disk."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.name = "step-00000002"
        self.path = "memory/step-00000002"
        self.content = files

    def files(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.content.items()}

    def files_nbytes(self, file: str) -> int:
        return len(self._get(file))

    def read_small(self, file: str, limit_bytes: int) -> bytes:
        data = self._get(file)
        if len(data) > limit_bytes:
            raise CheckpointDamaged(f"{file} is over the limit")
        return data

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        data = self._get(file)[offset : offset + nbytes]
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def close(self) -> None: ...

    def _get(self, file: str) -> bytes:
        if file not in self.content:
            raise CheckpointDamaged(f"{file} is missing")
        return self.content[file]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files. ``body``: the manifest's text without its own digest."""

    files: Mapping[str, bytes]

    @functools.cached_property
    def manifest(self) -> Manifest:
        return manifests.decode(self.files[manifests.FILE_NAME], "seed")

    @functools.cached_property
    def body(self) -> bytes:
        return unsealed(self.files[manifests.FILE_NAME])

    def with_body(self, body: bytes) -> MemoryReader:
        """The checkpoint with another manifest, whose own digest is right."""
        return MemoryReader({**self.files, manifests.FILE_NAME: manifests.seal(body)})

    def with_file(self, name: str, data: bytes) -> MemoryReader:
        """The checkpoint with another content of one file, and a manifest that says so: what only a forger can make."""
        digest = digests.get(self.manifest.digest)
        records = []
        for record in self.manifest.files:
            if record.name != name:
                records.append(record)
                continue
            extents, position = [], 0
            for number, extent in enumerate(record.extents):
                last = number == len(record.extents) - 1
                end = len(data) if last else min(len(data), position + extent.nbytes)
                digested = digest(data[position:end])
                extents.append(replace(extent, offset=position, nbytes=end - position, digest=digested))
                position = end
            records.append(replace(record, nbytes=len(data), extents=tuple(extents)))
        forged = manifests.encode(replace(self.manifest, files=tuple(records)))
        return MemoryReader({**self.files, name: data, manifests.FILE_NAME: forged})


def unsealed(data: bytes) -> bytes:
    return data[: data.rfind(b',"manifest_digest":"')]


def live_state() -> dict[str, Any]:
    """What is saved and what is restored into: every kind of component, a tensor large enough to be encoded."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "big": torch.randn(40_000),
        "plain": {"t": (1, 2.5, None), "s": {1, 2}, "b": b"xyz", 7: torch.arange(3), "x": [float("inf"), "é"]},
    }


@functools.cache
def checkpoint(variant: str) -> Checkpoint:
    """One of ``VARIANTS``, saved for real (its second step, so that a delta has something below it)."""
    folder = tempfile.mkdtemp(prefix="asyncckpt-fuzz-")
    try:
        state = live_state()
        with Checkpointer(f"{folder}/run", **by_stage(**VARIANTS[variant])) as run:
            run.save(1, state).result()
            state["big"][::1000] += 1e-3
            path = run.save(2, state, metrics={"loss": 0.5}).result().path
        reader = _read(path)
    finally:
        shutil.rmtree(folder)
    body = json.loads(reader[manifests.FILE_NAME])
    # only what is parsed: a long environment would take most of the mutations
    del body["manifest_digest"]
    body["environment"], body["config"] = {"torch": "2"}, None
    text = json.dumps(body, separators=(",", ":")).encode()
    return Checkpoint({**reader, manifests.FILE_NAME: manifests.seal(text[:-1])})


def _read(path: str) -> dict[str, bytes]:
    from asyncckpt.storage.local import LocalStore

    parent, _, name = path.rpartition("/")
    with contextlib.closing(LocalStore(parent).open(name)) as reader:
        return {file: reader.read_small(file, 1 << 30) for file in reader.files()}
