"""Fills live tensors with stored bytes: it finds the extents that are needed, and who takes bytes from each of them.

A tensor that lies whole in a file, or in boxes, is copied from the extents that cover it. A tensor that is cut into
chunks is decoded chunk by chunk. Only verified bytes are copied.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.formats import zarr
from asyncckpt.manifest.records import (
    BoxedRecord,
    BoxRecord,
    ChunkedRecord,
    ExtentRecord,
    FileRecord,
    Manifest,
    StoredTensor,
    TensorRecord,
)
from asyncckpt.manifest.spread import OwnComponent, SpreadRecord, boxes_in_each
from asyncckpt.manifest.table import tensors_by_file
from asyncckpt.read.boxes import Target, TargetBox, overlap_range, scatter_box, target_boxes
from asyncckpt.read.damage import raise_damage
from asyncckpt.read.decode import Decoder, as_tensor, byte_range, dtype_of
from asyncckpt.read.extents import Read, extents_of, read_alone
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.read.scatter import Window, scatter
from asyncckpt.read.whole_tensors import WholeTensors

if TYPE_CHECKING:
    import torch

#: Stored tensors, each with the targets that take its values.
Wanted = Sequence[tuple[StoredTensor, Sequence[Target]]]
#: A consumer is called with an extent's verified bytes.
Consumer = Callable[[memoryview], None]
#: It is called with the numbers of stored tensors whose targets are about to change.
Begun = Callable[[Sequence[int]], None]
_ReadRequests = list["_ReadRequest | _BoxReadRequest"]
_Found = Iterable[tuple[str, "_ReadRequest | _BoxReadRequest"]]


@dataclass(frozen=True, slots=True)
class _ReadRequest:
    """A live tensor wants the bytes ``[begin, end)`` of a file. ``origin``: the file offset at which the tensor's own
    first byte would lie. ``number``: the tensor's in what is filled."""

    begin: int
    end: int
    origin: int
    dtype: torch.dtype
    target: torch.Tensor
    number: int

    def copy_in(self, begin: int, data: torch.Tensor) -> None:
        """Copy bytes that begin at file offset ``begin`` into the target."""
        scatter(self.target, begin - self.origin, data, self.dtype)


@dataclass(frozen=True, slots=True)
class _BoxReadRequest:
    """A box of live memory wants some of the bytes ``[begin, end)`` of a file, in which a stored box of these
    ``offsets`` and this ``shape`` begins at ``origin``. ``number``: see ``_ReadRequest``."""

    begin: int
    end: int
    origin: int
    dtype: torch.dtype
    target: TargetBox
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    number: int

    def copy_in(self, begin: int, data: torch.Tensor) -> None:
        """Copy those of the bytes into the target that it shares with the box. Raises ``CheckpointDamaged``."""
        first, within = divmod(begin - self.origin, self.dtype.itemsize)
        if within:
            raise CheckpointDamaged("an extent begins in the middle of an element")
        scatter_box(self.target, self.offsets, self.shape, first, data, self.dtype)


def fill(
    checkpoint: OpenCheckpoint,
    wanted: Wanted,
    begun: Begun = lambda _numbers: None,
    beside: Wanted = (),
    read: Read = read_alone,
) -> int:
    """Read what ``wanted`` needs, verify it, and put it into the targets. Return how many bytes were read.

    ``begun(numbers)`` is called, on a reader thread, before targets of tensors of these numbers in ``wanted`` change.
    ``beside``: what is filled by other calls; files of which nothing else is left are verified as a whole. ``read``:
    reads the extents; one that reads together with other ranks is called also where nothing is wanted here. Blocks.
    Raises ``CheckpointDamaged``, and what a device does; targets may then hold a mix of old and new values.
    """
    if not wanted and read is read_alone:
        return 0
    reader, manifest = checkpoint.reader, checkpoint.manifest
    files = {record.name: record for record in manifest.files}
    began = time.perf_counter()
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    requests: dict[str, _ReadRequests] = defaultdict(list)
    consumers: dict[tuple[str, int], list[Consumer]] = defaultdict(list)
    decoder = Decoder(reader, manifest)
    base_files = functools.cache(lambda file: [files[base] for base in files[file].bases])
    chunk_numbers = functools.cache(lambda file: files[file].chunk_numbers())
    whole = WholeTensors()
    seen: set[int] = set()
    others: list[tuple[StoredTensor, Sequence[Target]]] = []
    spread = _spread_boxes(wanted)
    for number_in_wanted, (tensor, targets) in enumerate(wanted):
        if whole.take(number_in_wanted, tensor, targets):
            seen.add(id(tensor))
            continue
        others.append((tensor, targets))
        if isinstance(tensor, ChunkedRecord):
            spans = [byte_range(tensor, target) for target in targets]
            for file, number, chunk in _chunks(tensor):
                first, nbytes = tensor.span(chunk)
                taking = [
                    target
                    for target, (begin, end) in zip(targets, spans, strict=True)
                    if begin < first + nbytes and first < end
                ]
                if not taking:
                    continue
                extent = files[file].extents[number]
                ranges[file].append((extent.offset, extent.offset + extent.nbytes))
                base_chunks = base_files(file), chunk_numbers(file)[number] if files[file].bases else 0
                begin_it = functools.partial(begun, (number_in_wanted,))
                consumers[file, extent.offset].append(
                    functools.partial(decoder.decode_into, tensor, chunk, extent, base_chunks, taking, begin_it)
                )
            continue
        if isinstance(tensor, TensorRecord):
            found = _requests_of_whole(tensor, targets, number_in_wanted)
        else:
            found = _boxed(tensor, targets, number_in_wanted, spread.get(number_in_wanted))
        for file, request in found:
            ranges[file].append((request.begin, request.end))
            requests[file].append(request)
    mine: Counter[str] = Counter()
    for file, count, found_ranges in whole.close():
        mine[file] = count
        ranges[file] += found_ranges
    _add_whole_files(manifest, (others, beside), mine, seen, ranges)
    chosen = extents_of(manifest, ranges)
    for extent_key, entries in _requests_by_extent(chosen, requests).items():
        consumers[extent_key].append(functools.partial(_copy_in, entries, extent_key[1], begun))

    def consume(file: FileRecord, extent: ExtentRecord, view: memoryview) -> None:
        whole.copy_in(file.name, extent, view, begun)
        for consumer in consumers.get((file.name, extent.offset), ()):
            consumer(view)

    damage = read(reader, manifest, chosen, consume)
    if manifest.shard_format == "zarr":
        zarr.announce_dtypes()
    raise_damage(reader.path, damage)
    checkpoint.reading_seconds += time.perf_counter() - began
    return sum(extent.nbytes for _, extent in chosen)


def _requests_of_whole(tensor: TensorRecord, targets: Sequence[Target], number: int) -> _Found:
    """Yield what each target wants of a tensor that lies in one piece, with the file's name."""
    dtype = dtype_of(tensor)
    for target in targets:
        begin, end = byte_range(tensor, target)
        low, high = tensor.begin + begin, tensor.begin + end
        if begin >= end:
            continue
        if isinstance(target, TargetBox):
            offsets = tuple(0 for _ in tensor.shape)
            yield tensor.file, _BoxReadRequest(low, high, tensor.begin, dtype, target, offsets, tensor.shape, number)
        else:
            yield tensor.file, _ReadRequest(low, high, low, dtype, target.tensor, number)


def _spread_boxes(wanted: Wanted) -> dict[int, Sequence[BoxRecord]]:
    """Return the boxes that are needed of the tensors which parts of the manifest describe, by their numbers in
    ``wanted``."""
    spread = {number: one for number, (one, _) in enumerate(wanted) if isinstance(one, SpreadRecord)}
    rows = [(one, *_rows(_live_boxes(one, wanted[number][1]))) for number, one in spread.items()]
    return dict(zip(spread, boxes_in_each(rows), strict=True))


def _live_boxes(tensor: BoxedRecord, targets: Sequence[Target]) -> list[TargetBox]:
    return [box for target in targets for box in target_boxes(target, tensor.shape)]


def _rows(live: Sequence[TargetBox]) -> tuple[int, int]:
    """Return the first and the last of the rows that boxes of live memory want; a tensor without dimensions is one."""
    solid = [box for box in live if box.tensor.numel()]
    begin = min((box.offsets[0] if box.offsets else 0 for box in solid), default=0)
    return begin, max((box.offsets[0] + box.tensor.shape[0] if box.offsets else 1 for box in solid), default=0)


def _boxed(
    tensor: BoxedRecord, targets: Sequence[Target], number: int, stored: Sequence[BoxRecord] | None = None
) -> _Found:
    """Yield what each target wants of a tensor that lies in boxes, with the file's name. ``stored``: the boxes, where
    they are known already."""
    dtype = dtype_of(tensor)
    live = _live_boxes(tensor, targets)
    for box in tensor.boxes_in(*_rows(live)) if stored is None else stored:
        for target in live:
            first, last = overlap_range(box.offsets, box.shape, target)
            if first < last:
                low, high = box.begin + first * dtype.itemsize, box.begin + last * dtype.itemsize
                yield box.file, _BoxReadRequest(low, high, box.begin, dtype, target, box.offsets, box.shape, number)


def _add_whole_files(
    manifest: Manifest,
    wanted: Iterable[Wanted],
    mine: Counter[str],
    seen: set[int],
    ranges: dict[str, list[tuple[int, int]]],
) -> None:
    """Where every tensor of a shard is wanted, want the whole shard: what else is in it, its header, is then verified
    along with the tensors. ``mine``: how many whole tensors of each file are wanted beside those in ``wanted``.
    ``seen``: which these are, by identity: hashing a record walks over all of its chunks."""
    there: Counter[str] = Counter()
    for component in manifest.components.values():
        if not isinstance(component, OwnComponent):  # a large job has thousands, which parts describe
            there.update(tensors_by_file(component))
    for tensor, targets in itertools.chain.from_iterable(wanted):
        if id(tensor) in seen or not tensor.nbytes or isinstance(tensor, SpreadRecord):
            continue
        if isinstance(tensor, TensorRecord) and tensor.file not in ranges:
            continue
        if any(_takes_all(tensor, target) for target in targets):
            seen.add(id(tensor))
            mine.update(tensor.files)
    for file, count in mine.items():
        if count == there[file] and file in ranges:
            ranges[file].append((0, 1 << 62))


def _takes_all(tensor: StoredTensor, target: Target) -> bool:
    if type(target) is Window:
        return not target.first and target.tensor.numel() * ITEM_BYTES[tensor.dtype] == tensor.nbytes
    return byte_range(tensor, target) == (0, tensor.nbytes)


def _chunks(tensor: ChunkedRecord) -> Iterable[tuple[str, int, int]]:
    """Yield ``(file, number of the extent, number of the chunk)`` of every chunk."""
    chunk = 0
    for part in tensor.parts:
        for number in part.extents:
            yield part.file, number, chunk
            chunk += 1


def _copy_in(requests: _ReadRequests, offset: int, begun: Begun, view: memoryview) -> None:
    """Copy to each request what it wants of an extent that lies at ``offset``."""
    data = as_tensor(view)
    for request in requests:
        begun((request.number,))
        begin, end = max(request.begin, offset), min(request.end, offset + len(view))
        request.copy_in(begin, data[begin - offset : end - offset])


def _requests_by_extent(
    chosen: Sequence[tuple[FileRecord, ExtentRecord]], by_file: Mapping[str, _ReadRequests]
) -> dict[tuple[str, int], _ReadRequests]:
    """Find the requests that want bytes of each extent, in one sweep over both in file order. The keys are the extents'
    file names and offsets."""
    extents: dict[str, list[ExtentRecord]] = defaultdict(list)
    for file, extent in chosen:
        extents[file.name].append(extent)
    found: dict[tuple[str, int], _ReadRequests] = {}
    for name, requests in by_file.items():
        requests = sorted(requests, key=lambda request: request.begin)
        first = 0
        for extent in extents[name]:
            while first < len(requests) and requests[first].end <= extent.offset:
                first += 1
            at = first
            mine: _ReadRequests = []
            while at < len(requests) and requests[at].begin < extent.offset + extent.nbytes:
                if requests[at].end > extent.offset:
                    mine.append(requests[at])
                at += 1
            found[name, extent.offset] = mine
    return found
