"""One harness a parser of untrusted bytes: bytes in, nothing out; only this library's errors are swallowed."""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
import torch
from fuzz_checkpoints import Checkpoint, checkpoint, live_state
from fuzz_mutation import bytes_mutated, json_mutated

from asyncckpt import jsontree
from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES
from asyncckpt.codecs.codecs import Blosc, Zstd
from asyncckpt.errors import AsyncCkptError, CheckpointDamaged
from asyncckpt.formats import safetensors, zarr
from asyncckpt.manifest import json as manifests
from asyncckpt.read import verify
from asyncckpt.read.consistency import check_views
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.restore import restore
from asyncckpt.storage.lease import parse_holder

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Parser:
    """``prefix``: leading bytes that choose a case; what follows is JSON where ``text``. ``seeds`` makes the corpus.
    ``weight``: how many executions of a parser one of this counts for, being more than a parser."""

    name: str
    run: Run
    seeds: Callable[[], Sequence[bytes]]
    prefix: int = 0
    text: bool = True
    max_bytes: int = 16 << 10
    weight: int = 1

    def mutated(self, data: bytes, rng: random.Random, max_size: int = 1 << 20) -> bytes:
        """A neighbour of ``data``."""
        head, rest = data[: self.prefix].ljust(self.prefix, b"\0"), data[self.prefix :]
        if self.prefix and rng.random() < 0.1:
            head = bytes_mutated(head, rng, self.prefix).ljust(self.prefix, b"\0")
        mutate = json_mutated if self.text and rng.random() < 0.9 else bytes_mutated
        return head + mutate(rest, rng, min(max_size, self.max_bytes) - self.prefix)

    def execute(self, data: bytes) -> str | None:
        """Run it; the name of the typed error it ended with. Any other exception is a finding and comes out."""
        try:
            self.run(data)
        except AsyncCkptError as error:
            str(error)
            return type(error).__name__
        return None


# -- the manifest ------------------------------------------------------------------------------------------------------


def _manifest_seeds() -> list[bytes]:
    return [small_body(), *(checkpoint(variant).body for variant in ("plain", "encoded", "delta", "zarr"))]


def small_body() -> bytes:
    """The smallest manifest that has every field: what most executions start from."""
    files = [
        {"name": "base/a/m.safetensors", "nbytes": 12, "extents": [[0, 4, "00" * 4], [4, 8, "00" * 4, "00" * 4, 7]]},
        {
            "name": "m.safetensors",
            "nbytes": 12,
            "extents": [[0, 4, "00" * 4], [4, 8, "00" * 4, "planes:" + "00" * 4, 7]],
        },
        {"name": "state.json", "nbytes": 2, "extents": [[0, 2, "00" * 4]]},
    ]
    for file in files[:2]:
        file["plan"] = "p"
    files[1] |= {"bases": ["base/a/m.safetensors"], "order": [1]}
    chunked = {"dtype": "F32", "shape": [2], "chunk": 8, "run": 8, "padded": False, "parts": [["m.safetensors", 1, 1]]}
    body = {
        "format": "asyncckpt",
        "format_version": 2,
        "step": 1,
        "name": "s1",
        "attempt": "u",
        "kind": "full",
        "created_unix_seconds": 1.5,
        "world_size": 1,
        "shard_format": "safetensors",
        "digest": "crc32c",
        "layout": "",
        "metrics": {"a": 1, "b": "nan"},
        "config": None,
        "environment": {},
        "files": files,
        "codec": {"name": "zstd", "options": {"level": 1}},
        "components": {
            "m": {"kind": "module", "tensors": {"w": chunked}, "aliases": {"v": "w"}},
            "n": {"kind": "plain", "tensors": {"t": ["U8", [1, 2], "state.json", 0, 2]}, "aliases": {}},
        },
    }
    return json.dumps(body, separators=(",", ":")).encode()[:-1]


def _manifest(data: bytes) -> object:
    return manifests.decode(manifests.seal(data), "fuzz")


def _open_body(mutated: Run) -> Run:
    """The manifest's text lacks its last brace; mutation wants whole documents."""

    def run(data: bytes) -> object:
        return mutated(data[:-1] if data.endswith(b"}") else data)

    return run


# -- plain values ------------------------------------------------------------------------------------------------------


def _tensor(name: str) -> torch.Tensor:
    return _TENSORS[len(name) % len(_TENSORS)]


_TENSORS = (torch.arange(3), torch.ones(2, 2), torch.zeros(()))


def _state(data: bytes) -> object:
    return jsontree.decode(jsontree.loads(data, "state.json"), _tensor)


def _state_seeds() -> list[bytes]:
    tree = json.loads(checkpoint("plain").files["state.json"])
    every = [
        *({"$": tag, "v": [1, "a", 2, None]} for tag in ("dict", "OrderedDict", "Counter", "Namespace")),
        *({"$": tag, "v": [1, 2]} for tag in ("tuple", "set", "frozenset", "Size")),
        {"$": "SimpleNamespace", "v": ["a", 1]},
        {"$": "defaultdict", "v": [1, 2], "of": "list"},
        {"$": "deque", "v": [1], "maxlen": 3},
        *({"$": "numpy", "v": "00" * 4, "dtype": dtype} for dtype in ("<f4", ">i4")),
        {"$": "ndarray", "v": "AAAAAAAAAAA=", "dtype": "<i4", "shape": [2, 1]},
        {"$": "ndarray", "v": {"$": "tensor", "v": "abc"}, "dtype": "<i8", "shape": [3]},
        *({"$": "tensor", "v": "w"}, {"$": "int", "v": "f" * 600}, {"$": "float", "v": "7ff8" + "0" * 12}),
        *({"$": "complex", "v": "0" * 32}, {"$": "str", "v": "eda080"}, {"$": "bytes", "v": "AAA="}),
        *({"$": "bytearray", "v": ""}, {"$": "dtype", "v": "float32"}, {"$": "device", "v": ["cuda", 1]}),
    ]
    return [json.dumps(one).encode() for one in (*every, *tree.values(), every)]


# -- files of the formats ----------------------------------------------------------------------------------------------


def _header(data: bytes) -> object:
    """The first eight bytes: the bytes of data after the header; all ones: the rest is the raw head of a file."""
    text = data[8:]
    if data[:8] == b"\xff" * 8:
        return safetensors.parse_header(text, len(text), "fuzz")
    size = 8 + len(text) + int.from_bytes(data[:8], "little")
    return safetensors.parse_header(len(text).to_bytes(8, "little") + text, size, "fuzz")


def _header_seeds() -> list[bytes]:
    found = []
    for variant in ("plain", "encoded", "zstd"):
        for name, data in checkpoint(variant).files.items():
            if name.endswith(".safetensors"):
                length = int.from_bytes(data[:8], "little")
                text = data[8 : 8 + length].rstrip(b" ")
                found += [(len(data) - 8 - length).to_bytes(8, "little") + text]
                if len(data) < 6000:
                    found.append(b"\xff" * 8 + data)
    found.append((4).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')
    return found


def _zarr_json(data: bytes) -> object:
    return zarr.parse_array(data, "fuzz")


def _zarr_seeds() -> list[bytes]:
    files = {**checkpoint("zarr").files, **checkpoint("zarr-raw").files}
    return sorted({data for name, data in files.items() if name.endswith("zarr.json")})


def _zarr_index(data: bytes) -> object:
    """The first byte: how many chunks it should list; lowest bit of the second: whether the crc32c is made right."""
    body = data[2:]
    if data[1:2] and data[1] & 1:
        body += struct.pack("<I", google_crc32c.value(body))
    return zarr.index_lists(memoryview(body), [(1, 2)] * (data[0] if data else 0), "fuzz")


def _index_seeds() -> list[bytes]:
    return [bytes([entries, 1]) + zarr.encode_index([(1, 2)], entries)[:-4] for entries in (1, 2, 5)]


# -- codecs ------------------------------------------------------------------------------------------------------------

_DECODERS = (codecs.get("planes"), codecs.get("lz4"), codecs.get("zstd"), codecs.get("none"), codecs.get("blosc"))
_GUARD = 64


def _codec(data: bytes) -> object:
    """One byte: the codec; three: the size declared for the output; then the frame. Nothing beside it changes."""
    codec = _DECODERS[data[0] % len(_DECODERS)] if data else _DECODERS[0]
    nbytes = int.from_bytes(data[1:4], "little") % (1 << 18)
    whole = np.full(nbytes + 2 * _GUARD, 0xEE, np.uint8)
    try:
        codec.decode(np.frombuffer(data[4:], np.uint8), whole[_GUARD : _GUARD + nbytes])
    finally:
        if not (whole[:_GUARD] == 0xEE).all() or not (whole[_GUARD + nbytes :] == 0xEE).all():
            raise MemoryError("written past the output")
    return None


def _codec_seeds() -> list[bytes]:
    generator = np.random.default_rng(0)
    floats = generator.normal(size=6000).astype(np.float32).view(np.uint8)
    samples = [floats, np.zeros(300, np.uint8), np.arange(4096, dtype=np.uint8), floats[:17], floats[:0]]
    makers = [
        *(
            (0, codecs.get("planes")),
            (1, codecs.get("lz4")),
            (2, codecs.get("zstd")),
            (2, Zstd(level=9)),
            (3, codecs.get("none")),
        ),
        *(
            (4, Blosc(cname=name, shuffle="shuffle", blocksize=256))
            for name in ("lz4", "lz4hc", "zlib", "zstd", "blosclz")
        ),
        *((4, Blosc(cname=name, shuffle="bitshuffle")) for name in ("lz4", "zstd", "blosclz")),
    ]
    found = []
    for number, codec in makers:
        for sample in samples:
            out = np.zeros(sample.nbytes + FRAME_OVERHEAD_BYTES, np.uint8)
            frame = bytes(out[: codec.encode(sample, 4, out)])
            found.append(bytes([number]) + sample.nbytes.to_bytes(3, "little") + frame)
    return found


# -- whole checkpoints -------------------------------------------------------------------------------------------------

_VARIANTS = ("plain", "encoded", "zstd", "delta", "zarr", "zarr-raw")


def _chosen(data: bytes) -> tuple[Checkpoint, str, bytes]:
    """The first byte chooses the checkpoint, the second one of its view files; the rest is its new content."""
    variant = _VARIANTS[data[0] % len(_VARIANTS)] if data else _VARIANTS[0]
    source = checkpoint(variant)
    names = _views_of(variant)
    return source, names[(data[1] if len(data) > 1 else 0) % len(names)], data[2:]


@functools.cache
def _views_of(variant: str) -> list[str]:
    source = checkpoint(variant)
    return [n for n in source.files if n == "state.json" or n.endswith((".safetensors", "zarr.json"))]


def _views(data: bytes) -> object:
    """A forged view: the content's digests in the manifest are right, what it says may be anything."""
    source, name, content = _chosen(data)
    if name.endswith(".safetensors"):  # the new content is the header's text; the data after it stays
        old = source.files[name]
        length = int.from_bytes(old[:8], "little")
        content = length.to_bytes(8, "little") + content.ljust(length)[:length] + old[8 + length :]
    reader = source.with_file(name, content)
    damage = check_views(reader, manifests.load(reader))
    if damage:
        raise CheckpointDamaged(str(damage[0]))
    return damage


def _view_seeds() -> list[bytes]:
    found = []
    for number, variant in enumerate(_VARIANTS):
        source = checkpoint(variant)
        for index, name in enumerate(_views_of(variant)):
            data = source.files[name]
            if name.endswith(".safetensors"):
                data = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" ")
            found.append(bytes([number, index]) + data)
    return found


def _restore(data: bytes) -> object:
    """A forged ``state.json``, restored into live objects."""
    reader = checkpoint("plain").with_file("state.json", data)
    return restore.restore(open_checkpoint(reader), _live(), strict=False)


def _live() -> dict[str, object]:
    state = live_state()
    state["big"] = torch.zeros(40_000)
    return state


def _restore_seeds() -> list[bytes]:
    return [checkpoint("plain").files["state.json"]]


def _checkpoint(data: bytes) -> object:
    """A forged manifest over real files: verified, and every tensor loaded."""
    source = checkpoint(_VARIANTS[data[0] % len(_VARIANTS)] if data else _VARIANTS[0])
    body = data[1:]
    reader = source.with_body(body[:-1] if body.endswith(b"}") else body)
    damage = verify.verify(reader)
    loaded = restore.load_tensors(open_checkpoint(reader), None)
    if damage and _names_data(damage):
        raise AssertionError(f"loaded {list(loaded)} although {damage}")
    return loaded


def _names_data(damage: Sequence[object]) -> bool:
    return any("digest" in str(one) for one in damage)


def _checkpoint_seeds() -> list[bytes]:
    return [bytes([number]) + checkpoint(variant).body + b"}" for number, variant in enumerate(_VARIANTS)]


def _lease(data: bytes) -> object:
    if parse_holder(data) is None:
        raise CheckpointDamaged("no holder")
    return None


def _lease_seeds() -> list[bytes]:
    body = {"owner": "a" * 32, "host": "h", "boot": "h:b", "pid": 1, "beat": 2, "released": False}
    return [json.dumps(body).encode(), b"{}", b"[]", b"1"]


PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        Parser("manifest", _open_body(_manifest), lambda: [seed + b"}" for seed in _manifest_seeds()]),
        Parser("safetensors", _header, _header_seeds, prefix=8),
        Parser("state", _state, _state_seeds),
        Parser("zarr-json", _zarr_json, _zarr_seeds),
        Parser("zarr-index", _zarr_index, _index_seeds, prefix=2, text=False, max_bytes=2 << 10),
        Parser("codecs", _codec, _codec_seeds, prefix=4, text=False, max_bytes=64 << 10),
        Parser("lease", _lease, _lease_seeds, max_bytes=4 << 10),
        Parser("views", _views, _view_seeds, prefix=2, weight=100),
        Parser("restore", _restore, _restore_seeds, weight=200),
        Parser("checkpoint", _checkpoint, _checkpoint_seeds, prefix=1, max_bytes=32 << 10, weight=100),
    )
}
