"""Stored bytes → tensors: which extents are needed, and what each verified one gives to which targets."""

from __future__ import annotations

import functools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncckpt.codecs import blosc as frames
from asyncckpt.codecs import codecs, digests
from asyncckpt.codecs.dtypes import ITEM_BYTES, NAMES, PLANE_BYTES
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.formats import zarr
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.manifest.records import (
    BoxedRecord,
    ChunkedRecord,
    ExtentRecord,
    FileRecord,
    Manifest,
    StoredTensor,
    TensorRecord,
)
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.memory.tensor_bytes import is_plain
from asyncckpt.protocols import Codec, Digest, Reader
from asyncckpt.read.boxes import Region, Target, regions, scatter_box, span
from asyncckpt.read.damage import raise_damage
from asyncckpt.read.delta import LayerReader
from asyncckpt.read.extents import extents_of, read_extents
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.read.scatter import Window, scatter
from asyncckpt.types import Buffer, ContentDigest

if TYPE_CHECKING:
    import torch

Fill = Sequence[tuple[StoredTensor, Sequence[Target]]]
#: Takes an extent's verified bytes.
Use = Callable[[memoryview], None]
_Plain = list["_Wanted | _WantedOfBox"]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Bytes ``[begin, end)`` of a file that one live tensor takes; ``origin`` is where that tensor would begin."""

    begin: int
    end: int
    origin: int
    dtype: torch.dtype
    target: torch.Tensor

    def give(self, begin: int, data: torch.Tensor) -> None:
        scatter(self.target, begin - self.origin, data, self.dtype)


@dataclass(frozen=True, slots=True)
class _WantedOfBox:
    """Bytes ``[begin, end)`` of a file some of which a live region takes; ``box`` is what lies there, from ``origin``
    on."""

    begin: int
    end: int
    origin: int
    dtype: torch.dtype
    target: Region
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def give(self, begin: int, data: torch.Tensor) -> None:
        first, within = divmod(begin - self.origin, self.dtype.itemsize)
        if within:
            raise CheckpointDamaged("an extent begins in the middle of an element")
        scatter_box(self.target, self.offsets, self.shape, first, data, self.dtype)


def fill(checkpoint: OpenCheckpoint, wanted: Fill) -> int:
    """Read what ``wanted`` needs, verify it, and put it into the targets. Returns how many bytes were read.

    Raises ``CheckpointDamaged``; targets may then hold a mix of old and new values, which the message says.
    """
    reader, manifest = checkpoint.reader, checkpoint.manifest
    files = {record.name: record for record in manifest.files}
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    plain: dict[str, _Plain] = defaultdict(list)
    uses: dict[tuple[str, int], list[Use]] = defaultdict(list)
    decoder = _Decoder(reader, manifest)
    layers = functools.cache(lambda file: [files[base] for base in files[file].bases])
    numbers = functools.cache(lambda file: files[file].chunk_numbers())
    for tensor, windows in wanted:
        spans = [_span(tensor, window) for window in windows]
        if isinstance(tensor, ChunkedRecord):
            for file, number, chunk in _chunks(tensor):
                first, nbytes = tensor.span(chunk)
                targets = [
                    window
                    for window, (begin, end) in zip(windows, spans, strict=True)
                    if begin < first + nbytes and first < end
                ]
                if not targets:
                    continue
                extent = files[file].extents[number]
                ranges[file].append((extent.offset, extent.offset + extent.nbytes))
                below = layers(file), numbers(file)[number] if files[file].bases else 0
                uses[file, extent.offset].append(functools.partial(decoder.give, tensor, chunk, extent, below, targets))
            continue
        for file, entry in _whole(tensor, windows) if isinstance(tensor, TensorRecord) else _boxed(tensor, windows):
            ranges[file].append((entry.begin, entry.end))
            plain[file].append(entry)
    _want_whole_files(manifest, wanted, ranges)
    chosen = extents_of(manifest, ranges)
    for place, entries in _parts(chosen, plain).items():
        uses[place].append(functools.partial(_give_plain, entries, place[1]))

    def consume(file: FileRecord, extent: ExtentRecord, view: memoryview) -> None:
        for use in uses.get((file.name, extent.offset), ()):
            use(view)

    damage = read_extents(reader, manifest.digest, chosen, consume)
    if manifest.shard_format == "zarr":
        zarr.announce_dtypes()
    raise_damage(reader.path, damage, " The live objects may be partly overwritten: restore another checkpoint.")
    return sum(extent.nbytes for _, extent in chosen)


def _whole(tensor: TensorRecord, targets: Sequence[Target]) -> Iterable[tuple[str, _Wanted | _WantedOfBox]]:
    dtype = _dtype(tensor)
    for target in targets:
        begin, end = _span(tensor, target)
        low, high = tensor.begin + begin, tensor.begin + end
        if begin >= end:
            continue
        if isinstance(target, Region):
            offsets = tuple(0 for _ in tensor.shape)
            yield tensor.file, _WantedOfBox(low, high, tensor.begin, dtype, target, offsets, tensor.shape)
        else:
            yield tensor.file, _Wanted(low, high, low, dtype, target.tensor)


def _boxed(tensor: BoxedRecord, targets: Sequence[Target]) -> Iterable[tuple[str, _WantedOfBox]]:
    dtype = _dtype(tensor)
    live = [region for target in targets for region in regions(target, tensor.shape)]
    for box in tensor.boxes:
        for region in live:
            first, last = span(box.offsets, box.shape, region)
            if first < last:
                low, high = box.begin + first * dtype.itemsize, box.begin + last * dtype.itemsize
                yield box.file, _WantedOfBox(low, high, box.begin, dtype, region, box.offsets, box.shape)


def _span(tensor: StoredTensor, window: Target) -> tuple[int, int]:
    """The bytes of a stored tensor from the first to the last that a target takes."""
    item = ITEM_BYTES[tensor.dtype]
    if isinstance(window, Region):
        first, last = span([0] * len(tensor.shape), tensor.shape, window)
        return first * item, last * item
    return window.first * item, (window.first + window.tensor.numel()) * item


def _want_whole_files(manifest: Manifest, wanted: Fill, ranges: dict[str, list[tuple[int, int]]]) -> None:
    """Where every tensor of a shard is wanted, what is in it beside them (its header) is checked along with them."""
    all_tensors = (tensor for component in manifest.components.values() for tensor in component.tensors.values())
    there = Counter(file for tensor in all_tensors if tensor.nbytes for file in tensor.files)
    # by identity: hashing a record walks over all of its chunks
    whole = {id(tensor): tensor for tensor, ws in wanted if any(_span(tensor, w) == (0, tensor.nbytes) for w in ws)}
    mine = Counter(file for tensor in whole.values() if tensor.nbytes for file in tensor.files)
    for file, count in mine.items():
        if count == there[file]:
            ranges[file].append((0, 1 << 62))


def _chunks(tensor: ChunkedRecord) -> Iterable[tuple[str, int, int]]:
    """``(file, number of the extent, number of the chunk)`` of every chunk."""
    chunk = 0
    for part in tensor.parts:
        for number in part.extents:
            yield part.file, number, chunk
            chunk += 1


def _give_plain(entries: _Plain, offset: int, view: memoryview) -> None:
    data = _as_tensor(view)
    for entry in entries:
        begin, end = max(entry.begin, offset), min(entry.end, offset + len(view))
        entry.give(begin, data[begin - offset : end - offset])


class _Decoder:
    """Chunks → targets. Thread-safe: each reader thread has a buffer of its own."""

    def __init__(self, reader: Reader, manifest: Manifest) -> None:
        self._codec: Codec = codecs.get(manifest.codec, manifest.codec_options)
        self._digest: Digest = digests.get(manifest.digest)
        self._layers = LayerReader(reader, self._codec, self._digest)
        self._local = threading.local()

    def give(
        self,
        tensor: ChunkedRecord,
        chunk: int,
        extent: ExtentRecord,
        below: tuple[Sequence[FileRecord], int],
        windows: Sequence[Target],
        view: memoryview,
    ) -> None:
        """Raises ``CheckpointDamaged`` where the chunk does not decode to what was encoded."""
        begin, nbytes = tensor.span(chunk)
        decoded = tensor.chunk_bytes if tensor.padded else nbytes
        dtype = _dtype(tensor)
        if extent.content is None:
            data = _as_tensor(view)[:nbytes]
        else:
            low, high = _span(tensor, windows[0])
            whole = len(windows) == 1 and decoded == nbytes and low <= begin and begin + nbytes <= high
            direct = whole and isinstance(windows[0], Window) and _takes_bytes(windows[0].tensor, dtype)
            if direct:
                flat = windows[0].tensor.detach().reshape(-1).view(loaded_torch().uint8)
                out = flat[begin - low : begin - low + nbytes]
            else:
                out = self._buffer(decoded)
            self._codec.decode(np.frombuffer(view, np.uint8)[: extent.stored], out.numpy())
            self._layers.add(*below, out.numpy())
            if not self._is_what_was_saved(out.numpy(), PLANE_BYTES[tensor.dtype], extent.content):
                raise CheckpointDamaged("the chunk decodes to other bytes than were saved")
            if direct:
                return
            data = out[:nbytes]
        for window in windows:
            if isinstance(window, Region):
                offsets = [0] * len(tensor.shape)
                scatter_box(window, offsets, tensor.shape, begin // dtype.itemsize, data, dtype)
                continue
            low, high = _span(tensor, window)
            first, last = max(begin, low), min(begin + nbytes, high)
            scatter(window.tensor, first - low, data[first - begin : last - begin], dtype)

    def _is_what_was_saved(self, data: frames.Array, item_bytes: int, expected: ContentDigest) -> bool:
        """Whether decoded data has this content digest. The first code with codecs took the digest of the data itself
        instead; its checkpoints stay readable."""
        if self._content(data, item_bytes, expected.split) == expected.hex:
            return True
        return not expected.split and self._digest(data.data) == expected.hex

    def _content(self, data: frames.Array, item_bytes: int, split: bool) -> str:
        """The content digest of decoded data: that of the image it was staged as (docs/format.md)."""
        if split:
            places = frames.split_places(data.nbytes, item_bytes)
            image = np.zeros(padded(places[-1] + data.nbytes // item_bytes), np.uint8)
            for plane, place in enumerate(places):
                np.copyto(image[place : place + data.nbytes // item_bytes], data.reshape(-1, item_bytes)[:, plane])
            frames.split_frame(image, data.nbytes, item_bytes)
            return self._digest(image.data)
        header = np.empty(frames.BLOSC_HEADER_BYTES, np.uint8)
        frames.stored_frame(header, data.nbytes, item_bytes)
        return self._digest(
            header.data, data.data, bytes(padded(len(header) + data.nbytes) - len(header) - data.nbytes)
        )

    def _buffer(self, nbytes: int) -> torch.Tensor:
        kept: torch.Tensor | None = getattr(self._local, "buffer", None)
        if kept is None or kept.numel() < nbytes:
            kept = self._local.buffer = _as_tensor(aligned_buffer(nbytes))
        return kept[:nbytes]


def _as_tensor(memory: Buffer) -> torch.Tensor:
    there = loaded_torch()
    data: torch.Tensor = there.frombuffer(memory, dtype=there.uint8)
    return data


def _dtype(tensor: StoredTensor) -> torch.dtype:
    dtype: torch.dtype = getattr(loaded_torch(), NAMES[tensor.dtype])
    return dtype


def _takes_bytes(target: torch.Tensor, dtype: torch.dtype) -> bool:
    return target.dtype == dtype and target.device.type == "cpu" and is_plain(target)


def _parts(
    chosen: Sequence[tuple[FileRecord, ExtentRecord]], by_file: Mapping[str, _Plain]
) -> dict[tuple[str, int], _Plain]:
    """Which targets take bytes from which extent; one sweep over both in file order."""
    extents: dict[str, list[ExtentRecord]] = defaultdict(list)
    for file, extent in chosen:
        extents[file.name].append(extent)
    parts: dict[tuple[str, int], _Plain] = {}
    for name, entries in by_file.items():
        entries = sorted(entries, key=lambda entry: entry.begin)
        first = 0
        for extent in extents[name]:
            while first < len(entries) and entries[first].end <= extent.offset:
                first += 1
            at = first
            mine: _Plain = []
            while at < len(entries) and entries[at].begin < extent.offset + extent.nbytes:
                if entries[at].end > extent.offset:
                    mine.append(entries[at])
                at += 1
            parts[name, extent.offset] = mine
    return parts
