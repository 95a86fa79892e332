"""This module makes shards in the safetensors file format, and parses their headers, trusting nothing in them.

A file has the length of its header as 8 bytes, little-endian, a JSON header padded with spaces, and then the tensors'
bytes without holes (source: https://huggingface.co/docs/safetensors). The header is padded so that data begins at a
multiple of 4096: the official reader accepts that, and extents then begin with aligned bytes of tensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.errors import CheckpointDamaged, InvalidOption
from asyncckpt.formats import chunking as chunks
from asyncckpt.formats.plain_extents import PlacedTensor, PlainExtents
from asyncckpt.jsontree import loads
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import Codec
from asyncckpt.types import (
    ChunkRun,
    Extent,
    LayoutOptions,
    ShardFile,
    TensorRange,
    TensorSpec,
    WrittenRange,
)

#: The official reader refuses larger headers, too.
MAX_HEADER_BYTES = 100_000_000


#: A smaller tensor is never encoded: that would save a few blocks of the file system at most.
MIN_ENCODED_BYTES = 64 << 10
#: An encoded shard has this as its ``__metadata__["format"]``; loaders that know only plain shards refuse it.
ENCODED_FORMAT = "asyncckpt-chunks"
_ENCODED_VERSION = 1
#: A larger file is no config of a model.
_MAX_CONFIG_BYTES = 16 << 20


class SafetensorsFormat:
    """Implements ``protocols.ShardFormat`` for safetensors. With a codec, tensors of 64 KiB and more go into shards of
    their own. Those are valid safetensors files, too: each chunk is a U8 tensor (``name#0``, ``name#1``, …), and the
    header's ``__metadata__`` says how to read them."""

    name = "safetensors"

    def shards(
        self,
        component: str,
        specs: Sequence[TensorSpec],
        first_piece: int,
        first_shard: int,
        codec: Codec,
        options: LayoutOptions,
    ) -> list[ShardFile]:
        """Return the shards of a component: plain ones first, then encoded ones; frozen tensors and trained ones go
        into different shards. Tensors that have to lie in a file of another name lie there, all of them, and never
        encoded. Pure.

        Inside a shard tensors lie by descending item size, then by name: so each begins at a multiple of its item size
        without padding, which the format does not have, and no dict's order matters. A tensor is never split over
        shards; one larger than ``shard_bytes`` has a shard of its own.
        """
        order = sorted(range(len(specs)), key=lambda i: (-ITEM_BYTES[specs[i].dtype], specs[i].name))

        def encoded(index: int) -> bool:
            return codec.name != "none" and specs[index].nbytes >= MIN_ENCODED_BYTES

        named: dict[str, list[int]] = {}
        for index in order:
            if specs[index].file:
                named.setdefault(specs[index].file, []).append(index)
        order = [index for index in order if not specs[index].file]
        groups: list[tuple[bool, list[int]]] = []
        for encode in (False, True):
            for frozen in (True, False):
                chosen = [i for i in order if encoded(i) == encode and specs[i].frozen == frozen]
                groups += [(encode, group) for group in _split(chosen, specs, options.shard_bytes)]
        found: list[ShardFile] = []
        for number, (encode, group) in enumerate(groups):
            file = f"{component}-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            members = [(first_piece + index, specs[index]) for index in group]
            if encode:
                found.append(_encoded(first_shard + number, file, component, members, codec, options))
            else:
                found.append(_plain(first_shard + number, file, component, members, options))
        for file, group in named.items():
            members = [(first_piece + index, specs[index]) for index in group]
            found.append(_plain(first_shard + len(found), file, component, members, options))
        return found

    def seal(self, shard: ShardFile, placed: Sequence[WrittenRange], codec: Codec) -> tuple[bytes, bytes]:
        """Return the header of an encoded shard, which lists the chunks and says how to read them. Nothing follows the
        data."""
        return _encoded_header(shard, placed, codec), b""

    def small_files(self, component: str, shards: Sequence[ShardFile], codec: Codec) -> dict[str, bytes]:
        """Return nothing: a shard says what is in it."""
        return {}

    def root_files(self, indexed: Sequence[ShardFile], assets: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return the ``*.safetensors.index.json`` that Hugging Face loaders follow, under the name that those of the
        config among the assets look for. There is none where tensors are encoded or lie in boxes."""
        encoded = any(s.packed_on_write or any(p.part_of is not None for p in s.placements) for s in indexed)
        if encoded or not indexed:
            return {}
        if any(placement.spec.file for shard in indexed for placement in shard.placements):
            return {}  # those who read such a file know its name
        weight_map = {placement.spec.name: shard.file for shard in indexed for placement in shard.placements}
        total = sum(placement.spec.nbytes for shard in indexed for placement in shard.placements)
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return {_index_name(assets.get("config.json", b"")): (json.dumps(body, indent=2) + "\n").encode()}


def _index_name(config: bytes) -> str:
    """Return the name of the index that the loaders of a config's library open: diffusers has one of its own."""
    if b'"_diffusers_version"' in config and len(config) <= _MAX_CONFIG_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(config)
            if isinstance(found, dict) and "_diffusers_version" in found:
                return "diffusion_pytorch_model.safetensors.index.json"
    return "model.safetensors.index.json"


def image(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[int], int]:
    """Return ``(header, begins, nbytes)`` of a plain file that holds these tensors in this order: its first bytes, the
    offset of each tensor in it, and its size. ``metadata``: what the header's ``__metadata__`` says beside the format.
    Pure. Raises ``InvalidOption`` where the header would be too large."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins: list[int] = []
    position = 0
    for spec in specs:
        begins.append(position)
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (position, end)}
        position = end
    header = _header(entries)
    return header, [len(header) + begin for begin in begins], len(header) + position


def _header(entries: Mapping[str, object], nbytes: int = 0) -> bytes:
    """Return the header with its length before it, padded with spaces to a multiple of 4096 and at least to
    ``nbytes``."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    room = max(nbytes, padded(8 + len(text)))
    if room - 8 > MAX_HEADER_BYTES:
        raise InvalidOption(
            f"a safetensors file of {len(entries)} entries would have a header of {room - 8} bytes, and its readers "
            f"take up to {MAX_HEADER_BYTES}: save with a smaller shard_bytes, so that more files share the tensors"
        )
    return (room - 8).to_bytes(8, "little") + text.ljust(room - 8)


def _split(order: Sequence[int], specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[int]]:
    groups: list[list[int]] = []
    filled = 0
    for index in order:
        nbytes = specs[index].nbytes
        if not groups or (filled + nbytes > shard_bytes and filled):
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += nbytes
    return groups


def _plain(
    number: int, file: str, component: str, members: Sequence[tuple[int, TensorSpec]], options: LayoutOptions
) -> ShardFile:
    header, begins, nbytes = image([spec for _, spec in members])
    placements = tuple(
        TensorRange(spec, begin, begin + spec.nbytes) for (_, spec), begin in zip(members, begins, strict=True)
    )
    pieces = tuple(piece for piece, _ in members)
    lying = [PlacedTensor(placement, piece) for placement, piece in zip(placements, pieces, strict=True)]
    extents = PlainExtents(number, header, lying, nbytes, options.extent_bytes)
    return ShardFile(file, component, nbytes, placements, extents, pieces=pieces, header=header)


def _encoded(
    number: int,
    file: str,
    component: str,
    members: Sequence[tuple[int, TensorSpec]],
    codec: Codec,
    options: LayoutOptions,
) -> ShardFile:
    names = {spec.name for _, spec in members}
    found: list[Extent] = []
    runs: list[ChunkRun] = []
    for piece, spec in members:
        tensor = chunks.flat(spec, options.extent_bytes)
        count = chunks.chunk_count(tensor)
        clash = next((entry for i in range(count) if (entry := entry_name(spec.name, i)) in names), None)
        if clash is not None:
            raise InvalidOption(f"tensor {clash!r} has the name of a chunk of {spec.name!r}; rename one, or use zarr")
        runs.append(ChunkRun(tensor, len(found), count))
        found += chunks.extents(tensor, piece, number, 0, count, codec)
    most = sum(chunks.frame_bound(extent) for extent in found)
    shard = ShardFile(file, component, most, (), tuple(found), tuple(runs), packed_on_write=True)
    # a header with the largest numbers that there can be has the most digits: the real one is never longer
    reserved = len(_encoded_header(shard, [WrittenRange(most, most, most)] * len(found), codec))
    shard = replace(shard, header_bytes=reserved, nbytes=reserved + most)
    return replace(shard, content_key=chunks.content_key(shard, codec))


def _encoded_header(shard: ShardFile, placed: Sequence[WrittenRange], codec: Codec) -> bytes:
    base = shard.header_bytes
    entries: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for run in shard.runs:
        spec = run.tensor.spec
        mine = placed[run.first : run.first + run.count]
        described[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "chunk_bytes": run.tensor.chunk_bytes,
            "frames": [place.payload_bytes for place in mine],
        }
        for number, place in enumerate(mine):
            entries[entry_name(spec.name, number)] = {
                "dtype": "U8",
                "shape": (place.nbytes,),
                "data_offsets": (place.offset - base, place.offset - base + place.nbytes),
            }
    how = {"version": _ENCODED_VERSION, "codec": codec.name, "options": codec.to_dict(), "tensors": described}
    text = json.dumps(how, separators=(",", ":"))
    return _header({"__metadata__": {"format": ENCODED_FORMAT, "asyncckpt": text}, **entries}, base)


def entry_name(tensor: str, chunk: int) -> str:
    """Return the name that a chunk of a tensor has in the header."""
    return f"{tensor}#{chunk}"


def parse_header(head: bytes, file_nbytes: int, what: str) -> list[TensorRange]:
    """Return the tensors of a file of ``file_nbytes``, in file order. ``head`` is its beginning: 8 bytes and the whole
    header.

    Raises ``CheckpointDamaged``, which names the file as ``what``, for anything that the format does not allow: a
    header past the end or over 100 MB, duplicate names, overlaps, gaps, shapes that do not match their byte range, and
    unknown dtypes.
    """
    header_nbytes = header_length(head, file_nbytes, what)
    entries = loads(bytes(head[8 : 8 + header_nbytes]).rstrip(b" "), what)
    if not isinstance(entries, dict):
        raise CheckpointDamaged(f"{what}: the safetensors header is no JSON object")
    base = 8 + header_nbytes
    placements: list[TensorRange] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointDamaged(f"{what}: tensor {name!r} has a malformed header entry")
        spec, begin = _entry(name, entry["dtype"], entry["shape"], entry["data_offsets"], what)
        placements.append(TensorRange(spec, base + begin, base + begin + spec.nbytes))
    placements.sort(key=lambda placement: (placement.begin, placement.end))
    position = base
    for placement in placements:
        if placement.begin != position:
            raise CheckpointDamaged(f"{what}: tensor {placement.spec.name!r} leaves a gap or overlaps another")
        position = placement.end
    if position != file_nbytes:
        raise CheckpointDamaged(f"{what}: the header describes {position} bytes, the file has {file_nbytes}")
    return placements


def header_length(head: bytes, file_nbytes: int, what: str) -> int:
    """Return the length of the JSON header, which the first 8 bytes of the file give. Raises ``CheckpointDamaged``
    where the file cannot have such a header, so that nothing is read or allocated for it."""
    if len(head) < 8 or file_nbytes < 8:
        raise CheckpointDamaged(f"{what}: too short for a safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES or length > file_nbytes - 8:
        raise CheckpointDamaged(f"{what}: header length {length} is over the limit or past the end")
    return length


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return how many bytes a dense tensor has. The caller has checked dtype and shape."""
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return count


def _entry(name: str, dtype: object, shape: object, offsets: object, what: str) -> tuple[TensorSpec, int]:
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointDamaged(f"{what}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise CheckpointDamaged(f"{what}: tensor {name!r} has a malformed shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointDamaged(f"{what}: tensor {name!r} has malformed offsets")
    sizes = tuple(n for n in shape if type(n) is int)
    begin, end = (n for n in offsets if type(n) is int)
    nbytes = tensor_nbytes(dtype, sizes)
    if end - begin != nbytes:
        raise CheckpointDamaged(f"{what}: tensor {name!r} of shape {list(sizes)} does not fill its byte range")
    return TensorSpec(name, dtype, sizes, nbytes), begin
