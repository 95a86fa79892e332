"""The views of a checkpoint that other tools read (shard headers, zarr metadata, ``state.json``): do they say what the
manifest says?"""

from __future__ import annotations

import json
from collections.abc import Iterator

from asyncckpt import layers, plain
from asyncckpt.arena import aligned_buffer
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.formats import safetensors, zarr
from asyncckpt.manifest import STATE_FILE
from asyncckpt.protocols import Reader
from asyncckpt.reading import Damage, read_record
from asyncckpt.records import ChunkedRecord, ExtentRecord, FileRecord, Manifest, TensorRecord

#: Plain values are small; a larger file is not one this library wrote.
MAX_STATE_BYTES = 1 << 30
#: A shard index of sixteen million chunks.
_MAX_INDEX_BYTES = 256 << 20


def check_views(reader: Reader, manifest: Manifest) -> list[Damage]:
    """What differs. The files' bytes have been verified before. Blocks; reads headers and small files."""
    damage: list[Damage] = []
    files = {record.name: record for record in manifest.files}
    for record in manifest.files:
        try:
            if record.name == STATE_FILE:
                plain.loads(read_record(reader, manifest, record, MAX_STATE_BYTES), STATE_FILE)
            elif record.name.endswith(".safetensors"):
                problem = _safetensors_problem(reader, manifest, record)
                damage += [Damage(record.name, 0, 0, problem)] if problem else []
        except ValueError as error:
            damage.append(Damage(record.name, 0, record.nbytes, str(error)))
    if manifest.shard_format == "zarr":
        for component, name, tensor in _chunked(manifest):
            try:
                damage += _zarr_damage(reader, manifest, files, f"{component}.{name}", tensor)
            except ValueError as error:
                damage.append(Damage(f"{component}/{name}", 0, 0, str(error)))
    return damage


def _safetensors_problem(reader: Reader, manifest: Manifest, record: FileRecord) -> str | None:
    head = _head(reader, record)
    placements = safetensors.parse_header(head, record.nbytes, record.name)
    if layers.is_layer(record.name):
        return None  # a file of an earlier checkpoint: what is in it concerns only those that build on it
    found = {(p.spec.name, p.spec.dtype, p.spec.shape, p.begin, p.end) for p in placements}
    expected = {
        (name, tensor.dtype, tensor.shape, tensor.begin, tensor.end)
        for component in manifest.components.values()
        for name, tensor in component.tensors.items()
        if isinstance(tensor, TensorRecord) and tensor.file == record.name
    }
    frames: dict[str, list[int]] = {}
    for _, name, tensor in _chunked(manifest):
        for extent, chunk in _extents(tensor, record):
            end = extent.offset + extent.nbytes
            expected.add((safetensors.entry_name(name, chunk), "U8", (extent.nbytes,), extent.offset, end))
            frames.setdefault(name, []).append(extent.stored)
    if found != expected:
        return "its header lists other tensors than the manifest"
    if frames:
        text = json.loads(head[8:].rstrip(b" "))["__metadata__"].get("asyncckpt", "{}")
        described = json.loads(text).get("tensors", {})
        if {name: entry.get("frames") for name, entry in described.items()} != frames:
            return "its header describes other chunks than the manifest"
    return None


def _zarr_damage(
    reader: Reader, manifest: Manifest, files: dict[str, FileRecord], name: str, tensor: ChunkedRecord
) -> Iterator[Damage]:
    folders = {file.rpartition("/")[0] for file in tensor.files}
    for folder in folders:
        metadata = files.get(f"{folder}/{zarr.METADATA_FILE}")
        if metadata is None:
            yield Damage(f"{folder}/{zarr.METADATA_FILE}", 0, 0, f"there is no metadata for tensor {name}")
            continue
        described = zarr.parse_array(read_record(reader, manifest, metadata, MAX_STATE_BYTES), metadata.name)
        if described != (tensor.dtype, tensor.shape):
            yield Damage(metadata.name, 0, metadata.nbytes, f"it describes another array than the manifest's {name}")
    if sum(len(part.extents) for part in tensor.parts) > 1:
        for part in tensor.parts:
            record = files[part.file]
            places = [(e.offset, e.stored or e.nbytes) for e in (record.extents[i] for i in part.extents)]
            if _index(reader, record)[: len(places)] != places:
                yield Damage(part.file, record.extents[-1].offset, 0, "its index lists other chunks than the manifest")


def _index(reader: Reader, record: FileRecord) -> list[tuple[int, int] | None]:
    last = record.extents[-1]
    if last.nbytes > _MAX_INDEX_BYTES or last.content:
        raise CheckpointDamaged(f"{record.name}: there is no shard index where it should be")
    buffer = aligned_buffer(last.nbytes)
    reader.read_into(record.name, buffer, last.nbytes, last.offset)
    return zarr.decode_index(bytes(buffer[: last.nbytes]), (last.nbytes - 4) // 16, record.name)


def _chunked(manifest: Manifest) -> Iterator[tuple[str, str, ChunkedRecord]]:
    for component, record in manifest.components.items():
        for name, tensor in record.tensors.items():
            if isinstance(tensor, ChunkedRecord):
                yield component, name, tensor


def _extents(tensor: ChunkedRecord, record: FileRecord) -> Iterator[tuple[ExtentRecord, int]]:
    number = 0
    for part in tensor.parts:
        for index in part.extents:
            if part.file == record.name:
                yield record.extents[index], number
            number += 1


def _head(reader: Reader, record: FileRecord) -> bytes:
    first = aligned_buffer(4096)
    reader.read_into(record.name, first, min(4096, record.nbytes), 0)
    length = 8 + safetensors.header_length(bytes(first[:8]), record.nbytes, record.name)
    head = aligned_buffer(length)
    reader.read_into(record.name, head, length, 0)
    return bytes(head[:length])
