"""Other tools read a checkpoint through its shard headers, zarr metadata and ``state.json``: these views are compared
with the manifest, which this library reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.formats import safetensors, zarr
from asyncckpt.manifest.json import MAX_STATE_BYTES, STATE_FILE
from asyncckpt.manifest.records import BoxedRecord, ChunkedRecord, FileRecord, Manifest, TensorRecord
from asyncckpt.manifest.spread import OwnComponent, SpreadFile, SpreadRecord
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Reader
from asyncckpt.read.damage import Damage
from asyncckpt.read.delta import is_layer
from asyncckpt.read.extents import read_record
from asyncckpt.read.part_views import check_parts
from asyncckpt.types import JsonValue

#: The ``zarr.json`` of one array is far smaller.
_MAX_METADATA_BYTES = 16 << 20


def check_views(reader: Reader, manifest: Manifest) -> list[Damage]:
    """Return where the views differ from the manifest. The files' bytes must have been verified before. Blocks: headers
    and small files are read."""
    damage: list[Damage] = []
    files = {record.name: record for record in manifest.files}
    headers = _headers(manifest, files)
    if STATE_FILE not in files:
        damage.append(Damage(STATE_FILE, 0, 0, "the manifest does not list it, and nothing is restored without it"))
    for record in manifest.files:
        try:
            if record.name == STATE_FILE:
                jsontree.loads(read_record(reader, manifest, record, MAX_STATE_BYTES), STATE_FILE)
            elif isinstance(record, SpreadFile):
                continue  # its part says what it should be
            elif record.name.endswith(".safetensors"):
                # what an earlier checkpoint's file holds concerns only the files that build on it
                expected = None if is_layer(record.name) else headers.get(record.name, _Header())
                problem = _safetensors_problem(reader, record, expected)
                damage += [Damage(record.name, 0, 0, problem)] if problem else []
        except ValueError as error:
            damage.append(Damage(record.name, 0, record.nbytes, str(error)))
    damage += check_parts(manifest, lambda record, entries: _safetensors_problem(reader, record, _Header(entries)))
    if manifest.shard_format == "zarr":
        for component, name, tensor in _chunked(manifest):
            try:
                damage += _zarr_damage(reader, manifest, files, f"{component}.{name}", tensor)
            except ValueError as error:
                damage.append(Damage(f"{component}/{name}", 0, 0, str(error)))
    return damage


@dataclass(slots=True)
class _Header:
    """Holds what a shard's header should say: its entries, and the frames' sizes of each tensor that is cut into
    chunks."""

    entries: set[tuple[str, str, tuple[int, ...], int, int]] = field(default_factory=set)
    frames: dict[str, list[int]] = field(default_factory=dict)


def _headers(manifest: Manifest, files: Mapping[str, FileRecord]) -> dict[str, _Header]:
    """Make the header that each shard should have, by file name, in one walk over the manifest."""
    found: defaultdict[str, _Header] = defaultdict(_Header)
    for component_name, component in manifest.components.items():
        for name, tensor in () if isinstance(component, OwnComponent) else component.tensors.items():
            if isinstance(tensor, SpreadRecord):
                continue
            if isinstance(tensor, TensorRecord):
                found[tensor.file].entries.add((name, tensor.dtype, tensor.shape, tensor.begin, tensor.end))
                continue
            if isinstance(tensor, BoxedRecord):
                for box in tensor.boxes:
                    called = box.entry(f"{component_name}.{name}")
                    found[box.file].entries.add((called, tensor.dtype, box.shape, box.begin, box.end))
                continue
            chunk = 0
            for part in tensor.parts:
                header = found[part.file]
                for number in part.extents:
                    extent = files[part.file].extents[number]
                    entry = safetensors.entry_name(name, chunk)
                    end = extent.offset + extent.nbytes
                    header.entries.add((entry, "U8", (extent.nbytes,), extent.offset, end))
                    header.frames.setdefault(name, []).append(extent.payload_bytes)
                    chunk += 1
    return found


def _safetensors_problem(reader: Reader, record: FileRecord, expected: _Header | None) -> str | None:
    """Say how a shard's header differs from the expected one, or None. Where nothing is expected, it only has to be a
    header."""
    head = _head(reader, record)
    placements = safetensors.parse_header(head, record.nbytes, record.name)
    if expected is None:
        return None
    if {(p.spec.name, p.spec.dtype, p.spec.shape, p.begin, p.end) for p in placements} != expected.entries:
        return "its header lists other tensors than the manifest"
    if expected.frames and _described_frames(head, record.name) != expected.frames:
        return "its header describes other chunks than the manifest"
    return None


def _described_frames(head: bytes, what: str) -> dict[str, JsonValue] | None:
    """Return the frames' sizes of each tensor as an encoded shard's own header gives them; None where it gives none.
    Raises ``CheckpointDamaged``."""
    entries = jsontree.loads(head[8:].rstrip(b" "), what)
    metadata = entries.get("__metadata__") if isinstance(entries, dict) else None
    text = metadata.get("asyncckpt") if isinstance(metadata, dict) else None
    how = jsontree.loads(text.encode("utf-8", "replace"), what) if isinstance(text, str) else None
    tensors = how.get("tensors") if isinstance(how, dict) else None
    if not isinstance(tensors, dict):
        return None
    return {name: entry.get("frames") if isinstance(entry, dict) else None for name, entry in tensors.items()}


def _zarr_damage(
    reader: Reader, manifest: Manifest, files: Mapping[str, FileRecord], name: str, tensor: ChunkedRecord
) -> Iterator[Damage]:
    """Compare a tensor's ``zarr.json`` and its shards' indexes with the manifest."""
    folders = {file.rpartition("/")[0] for file in tensor.files}
    for folder in folders:
        metadata = files.get(f"{folder}/{zarr.METADATA_FILE}")
        if metadata is None:
            yield Damage(f"{folder}/{zarr.METADATA_FILE}", 0, 0, f"there is no metadata for tensor {name}")
            continue
        described = zarr.parse_array(read_record(reader, manifest, metadata, _MAX_METADATA_BYTES), metadata.name)
        if described != (tensor.dtype, tensor.shape):
            yield Damage(metadata.name, 0, metadata.nbytes, f"it describes another array than the manifest's {name}")
    if sum(len(part.extents) for part in tensor.parts) > 1:
        for part in tensor.parts:
            record = files[part.file]
            places = [(e.offset, e.payload_bytes or e.nbytes) for e in (record.extents[i] for i in part.extents)]
            if not _index_says(reader, record, places):
                yield Damage(part.file, record.extents[-1].offset, 0, "its index lists other chunks than the manifest")


def _index_says(reader: Reader, record: FileRecord, places: list[tuple[int, int]]) -> bool:
    """Whether the index at a shard's end lists these chunks, each with offset and size."""
    last = record.extents[-1]
    if last.nbytes > zarr.MAX_INDEX_BYTES or last.content:
        raise CheckpointDamaged(f"{record.name}: there is no shard index where it should be")
    buffer = aligned_buffer(last.nbytes)
    reader.read_into(record.name, buffer, last.nbytes, last.offset)
    return zarr.index_lists(memoryview(buffer)[: last.nbytes], places, record.name)


def _chunked(manifest: Manifest) -> Iterator[tuple[str, str, ChunkedRecord]]:
    """Yield each tensor that is cut into chunks, with its component's name and its own."""
    for component, record in manifest.components.items():
        for name, tensor in () if isinstance(record, OwnComponent) else record.tensors.items():
            if isinstance(tensor, ChunkedRecord):
                yield component, name, tensor


def _head(reader: Reader, record: FileRecord) -> bytes:
    """Read a safetensors file up to the end of its header."""
    first = aligned_buffer(4096)
    reader.read_into(record.name, first, min(4096, record.nbytes), 0)
    length = 8 + safetensors.header_length(bytes(first[:8]), record.nbytes, record.name)
    head = aligned_buffer(length)
    reader.read_into(record.name, head, length, 0)
    return bytes(head[:length])
