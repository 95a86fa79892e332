"""In zarr v3 a component is a group and a tensor is an array, whose shards this library writes itself.

zarr-python makes the metadata and reads it; it does not write the data, because its write path is several times slower
than the disk. A tensor of one chunk is one chunk file. A larger one has shards (``sharding_indexed``), whose chunks
begin at multiples of 4096 and which end with an index and the crc32c of that.
Source: https://zarr-specs.readthedocs.io/en/latest/v3/ (core 3.1; codecs/sharding-indexed 1.0).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import logging
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import google_crc32c
import numpy as np

from asyncckpt.codecs.dtypes import ITEM_BYTES, PLANE_BYTES
from asyncckpt.errors import CheckpointDamaged, InvalidOption
from asyncckpt.formats import chunking as chunks
from asyncckpt.jsontree import loads
from asyncckpt.protocols import Codec
from asyncckpt.types import Chunking, ChunkRun, Extent, LayoutOptions, ShardFile, TensorSpec, WrittenRange

log = logging.getLogger("asyncckpt")

METADATA_FILE: Final = "zarr.json"
#: The index of a shard of sixteen million chunks has so many bytes; a larger one is taken for damage.
MAX_INDEX_BYTES = 256 << 20
#: The index has this number for a chunk that is not there because it lies past the array's edge.
_ABSENT: Final = (1 << 64) - 1
_CRC_BYTES: Final = 4
#: Zarr calls the dtypes so; bfloat16 and the 8-bit floats have TensorStore's names (``integrations/zarr_dtypes.py``).
DATA_TYPES: Final[Mapping[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
#: This is the first zarr-python that loads the entry points of data types by itself.
_LOADS_ENTRY_POINTS: Final = (3, 4, 1)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\Z")


class ZarrFormat:
    """Implements ``protocols.ShardFormat`` for zarr v3."""

    name = "zarr"

    def shards(
        self,
        component: str,
        specs: Sequence[TensorSpec],
        first_piece: int,
        first_shard: int,
        codec: Codec,
        options: LayoutOptions,
    ) -> list[ShardFile]:
        """Return one shard for each shard of each array, the tensors sorted by name. Pure."""
        paths = node_names(spec.name for spec in specs)
        found: list[ShardFile] = []
        for index in sorted(range(len(specs)), key=lambda i: specs[i].name):
            spec = specs[index]
            tensor = chunks.grid(spec, options.extent_bytes, options.shard_bytes)
            if not spec.nbytes:  # an array without elements has no chunks, and so no file
                found.append(
                    ShardFile(f"{component}/{paths[spec.name]}/c", component, 0, (), (), (ChunkRun(tensor, 0, 0),))
                )
            for cut in chunks.shard_cuts(tensor):
                number = first_shard + len(found)
                key = ".".join(["c", *map(str, cut.coordinates)])
                file = f"{component}/{paths[spec.name]}/{key}"
                extents = chunks.extents(tensor, first_piece + index, number, cut.first, cut.last, codec)
                run = ChunkRun(tensor, 0, len(extents))
                found.append(_shard(file, component, run, number, extents, codec))
        return found

    def seal(self, shard: ShardFile, placed: Sequence[WrittenRange], codec: Codec) -> tuple[bytes, bytes]:
        """Return nothing to go before the data, and the index to go after it where the array is sharded."""
        tensor = shard.runs[0].tensor
        if chunks.chunk_count(tensor) == 1:
            return b"", b""
        return b"", encode_index([(place.offset, place.payload_bytes) for place in placed], chunks.inner_count(tensor))

    def small_files(self, component: str, shards: Sequence[ShardFile], codec: Codec) -> dict[str, bytes]:
        """Return the files ``zarr.json`` of the component's group and of its arrays."""
        announce_dtypes()
        files = {f"{component}/{METADATA_FILE}": group_metadata()}
        for shard in shards:
            tensor = shard.runs[0].tensor
            folder = shard.file.rpartition("/")[0]
            files.setdefault(f"{folder}/{METADATA_FILE}", array_metadata(tensor, codec, folder))
        return files

    def root_files(self, indexed: Sequence[ShardFile], assets: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return the file ``zarr.json`` of the checkpoint's root, which is a group. In a job, one rank writes it."""
        return {METADATA_FILE: group_metadata()}


def _shard(file: str, component: str, run: ChunkRun, number: int, extents: list[Extent], codec: Codec) -> ShardFile:
    index_bytes = 16 * chunks.inner_count(run.tensor) + _CRC_BYTES if chunks.chunk_count(run.tensor) > 1 else 0
    if index_bytes > MAX_INDEX_BYTES:
        raise InvalidOption(
            f"{file}: a shard of {chunks.inner_count(run.tensor)} chunks has an index of {index_bytes} bytes, and "
            f"readers take up to {MAX_INDEX_BYTES}: save with a smaller shard_bytes or a larger chunk_bytes"
        )
    if codec.name != "none":
        most = sum(chunks.frame_bound(extent) for extent in extents) + index_bytes
        shard = ShardFile(file, component, most, (), tuple(extents), (run,), packed_on_write=True)
        return replace(shard, content_key=chunks.content_key(shard, codec))
    size = extents[-1].offset + extents[-1].nbytes
    if index_bytes:
        places = [(extent.offset, extent.payload_bytes) for extent in extents]
        index = encode_index(places, chunks.inner_count(run.tensor))
        extents.append(Extent(number, size, len(index), index, ()))
    return ShardFile(file, component, size + index_bytes, (), tuple(extents), (run,))


def encode_index(places: Sequence[tuple[int, int]], entries: int) -> bytes:
    """Return the index of a shard: the offset and size of each chunk as little-endian uint64, then the crc32c of that.
    Chunks beyond ``places``, up to ``entries``, are marked as absent."""
    numbers = [number for place in places for number in place] + [_ABSENT] * (2 * (entries - len(places)))
    body = struct.pack(f"<{2 * entries}Q", *numbers)
    return body + struct.pack("<I", google_crc32c.value(body))


def index_lists(data: memoryview, places: Sequence[tuple[int, int]], what: str) -> bool:
    """Return whether the shard index ``data`` lists these chunks and no others; no object is made for each entry.
    Raises ``CheckpointDamaged``, which names the file as ``what``, where ``data`` is not an index."""
    entries = (len(data) - _CRC_BYTES) // 16
    if len(data) != 16 * entries + _CRC_BYTES:
        raise CheckpointDamaged(f"{what}: {len(data)} bytes are no shard index")
    found = np.frombuffer(data, np.uint8)
    if struct.pack("<I", google_crc32c.value(found[:-_CRC_BYTES])) != bytes(data[-_CRC_BYTES:]):
        raise CheckpointDamaged(f"{what}: the shard index does not match its crc32c")
    listed = found[:-_CRC_BYTES].view("<u8").reshape(entries, 2)
    if len(places) > entries or (listed[: len(places)] != np.array(places, np.uint64).reshape(-1, 2)).any():
        return False
    return bool((listed[len(places) :] == _ABSENT).all())


def node_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of tensors to the names of their arrays' directories. A directory has the tensor's name where every
    file system and zarr take it and no other name differs from it only in case; otherwise the offending characters are
    written as ``=XX``, their UTF-8 bytes in hex."""
    chosen = sorted(names)
    folded: dict[str, int] = {}
    for name in chosen:
        folded[name.casefold()] = folded.get(name.casefold(), 0) + 1
    return {name: _node_name(name, unique=folded[name.casefold()] == 1) for name in chosen}


def _node_name(name: str, *, unique: bool) -> str:
    if unique and _PLAIN_NAME.match(name) and name.casefold() != METADATA_FILE:
        return name
    # the first character is always escaped, so that the name differs from every plain one and from zarr's `__…`, `.…`
    safe = "" if unique else "abcdefghijklmnopqrstuvwxyz"
    text = "".join(
        char if i and (char in safe if not unique else re.match(r"[A-Za-z0-9._+-]", char)) else _escaped(char)
        for i, char in enumerate(name)
    )
    if len(text) > 200:
        return f"{text[:120].rpartition('=')[0]}={_short_hash(name)}"
    return text or "="


def _escaped(char: str) -> str:
    return "".join(f"={byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))


def _short_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def array_metadata(tensor: Chunking, codec: Codec, folder: str) -> bytes:
    """Return the ``zarr.json`` of a tensor's array in the directory ``folder``. Arrays of equal shape, dtype and codec
    have equal metadata, unless ``folder`` is not named after the tensor: then an attribute holds its name."""
    spec = tensor.spec
    sharded = chunks.chunk_count(tensor) > 1
    plane = PLANE_BYTES[spec.dtype]
    codecs = json.dumps(codec.zarr(plane))
    shard_shape = tensor.shard_shape if sharded else None
    named = None if folder.endswith(f"/{spec.name}") else spec.name
    return _array_json(spec.dtype, spec.shape, tensor.chunk_shape, shard_shape, codecs, named)


@functools.lru_cache(maxsize=4096)
def _array_json(
    dtype: str,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    shard_shape: tuple[int, ...] | None,
    codecs: str,
    name: str | None,
) -> bytes:
    data = copy.deepcopy(_template(dtype, len(shape), shard_shape is not None))
    data["shape"] = list(shape)
    data["chunk_grid"]["configuration"]["chunk_shape"] = list(shard_shape or chunk_shape)
    inner = data["codecs"]
    if shard_shape is not None:
        data["codecs"][0]["configuration"]["chunk_shape"] = list(chunk_shape)
        inner = data["codecs"][0]["configuration"]["codecs"]
    inner += json.loads(codecs)
    if name is not None:
        data["attributes"] = {"asyncckpt_name": name}
    return (json.dumps(data, indent=1) + "\n").encode()


@functools.lru_cache(maxsize=256)
def _template(dtype: str, dimensions: int, sharded: bool) -> Any:
    """Return the metadata that zarr-python writes for an uncompressed array of that dtype and number of dimensions. For
    a dtype that numpy lacks, an unsigned integer of its size stands in: only the name and the fill value differ."""
    import zarr
    from zarr.storage import MemoryStore

    name = DATA_TYPES[dtype]
    stand_in = f"uint{ITEM_BYTES[dtype] * 8}" if name.startswith(("bfloat", "float8")) else name
    store: dict[str, Any] = {}
    ones = (1,) * dimensions
    zarr.create_array(
        store=MemoryStore(store),
        shape=ones,
        chunks=ones,
        shards=ones if sharded else None,
        dtype=stand_in,
        compressors=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        zarr_format=3,
    )
    data = json.loads(store[METADATA_FILE].to_bytes())
    if name != stand_in:
        data["data_type"], data["fill_value"] = name, 0.0
    return data


@functools.cache
def group_metadata() -> bytes:
    """Return the ``zarr.json`` of a group."""
    import zarr
    from zarr.storage import MemoryStore

    store: dict[str, Any] = {}
    zarr.create_group(store=MemoryStore(store), zarr_format=3)
    content: bytes = store[METADATA_FILE].to_bytes()
    return content


@functools.cache
def announce_dtypes() -> None:
    """Make ``zarr.open`` know bfloat16 and the 8-bit floats in this process, which writes or reads zarr checkpoints.
    Newer versions of zarr-python find them by themselves; an older one is imported for it."""
    try:
        numbers = re.findall(r"\d+", importlib.metadata.version("zarr"))
        if tuple(map(int, numbers[:3])) < _LOADS_ENTRY_POINTS:
            from asyncckpt.integrations.zarr_dtypes import register

            register()
    except ImportError:
        log.info("zarr-python is not here, so nobody can open these arrays with it in this process")


def parse_array(data: bytes, what: str) -> tuple[str, tuple[int, ...]]:
    """Return the dtype code and the shape that an array's ``zarr.json`` gives. Raises ``CheckpointDamaged``, which
    names the file as ``what``, where it gives none."""
    body = loads(data, what)
    if not isinstance(body, dict) or body.get("node_type") != "array":
        raise CheckpointDamaged(f"{what}: no metadata of a zarr array")
    codes = [code for code, name in DATA_TYPES.items() if name == body.get("data_type")]
    shape = body.get("shape")
    if not codes or not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise CheckpointDamaged(f"{what}: an array of unknown dtype or shape")
    return codes[0], tuple(size for size in shape if type(size) is int)
