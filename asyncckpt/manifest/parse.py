"""This module parses a manifest's rows of files, extents and tensors. They may come from an attacker.

Whatever does not hold raises ``ManifestInvalid``, which names the manifest's file and the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from asyncckpt.codecs import digests
from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.errors import ManifestInvalid
from asyncckpt.manifest.overlaps import apart, overlap_problem
from asyncckpt.manifest.records import (
    BoxedRecord,
    BoxRecord,
    ChunkedRecord,
    ComponentRecord,
    ExtentRecord,
    FileRecord,
    PartRecord,
    StoredTensor,
    TensorRecord,
)
from asyncckpt.manifest.spread import OwnComponent, PartSource, SpreadFile, SpreadRecord
from asyncckpt.manifest.table import table_of
from asyncckpt.memory.tensor_bytes import is_dense
from asyncckpt.types import MANIFEST_FILE, MAX_EXTENT_BYTES, ContentDigest

#: In the manifest's text, a content digest whose image was split into planes begins so.
SPLIT_MARK: Final = "planes:"
#: A chunk is decoded into memory as a whole, so its size is limited as that of an extent is.
MAX_CHUNK_BYTES: Final = MAX_EXTENT_BYTES
#: No row may name the manifest itself.
_NAME: Final = re.compile(r"[A-Za-z0-9_=][A-Za-z0-9._=+-]{0,254}\Z")
#: A file's name has at most so many parts, directories included.
_MAX_DEPTH: Final = 3
#: No number in a manifest is as large as this one.
NUMBER_LIMIT: Final = 1 << 62
#: Longer names of classes and attempts are taken for an attack.
_MAX_TEXT: Final = 1000


def is_component_name(name: str) -> bool:
    """Return whether a component can have this name."""
    return _NAME.match(name) is not None and "." not in name


def is_file_name(name: str) -> bool:
    """Return whether a file of a checkpoint can have this name: plain, with at most two directories before it."""
    parts = name.split("/")
    return len(parts) <= _MAX_DEPTH and all(_NAME.match(part) for part in parts)


class Body:
    """``Body`` gives checked access to a parsed JSON object: a field that is missing or has the wrong type raises
    ``ManifestInvalid`` at once, instead of another error later. ``where`` names the manifest's file."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            self.fail("is no JSON object")
        self._value = value

    def fail(self, problem: str) -> NoReturn:
        """Raise ``ManifestInvalid``. ``problem`` goes on with the sentence "The manifest …"."""
        raise ManifestInvalid(f"{self.where}: the manifest {problem}")

    def take(self, key: str, kind: type) -> Any:
        """Return the value of ``key``, which must be there and be a ``kind``; ``float`` takes whole numbers, too."""
        if key not in self._value:
            self.fail(f"lacks {key!r}")
        value = self._value[key]
        if kind is float:
            valid = is_number(value)
        else:
            valid = isinstance(value, kind) and not (kind is int and type(value) is bool)
        if not valid:
            self.fail(f"has a {key!r} of the wrong type")
        return value

    def optional(self, key: str, default: Any) -> Any:
        """Return the value of ``key``, which is not checked, or ``default`` where the object lacks it."""
        return self._value.get(key, default)

    def text(self, key: str) -> str:
        """Return the value of ``key``, which must be text, or "" where the object lacks it."""
        value = self._value.get(key, "")
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            self.fail(f"has a {key!r} that is no text, or a very long one")
        return value

    def whole(self, key: str) -> int:
        """Return the value of ``key``, which must be a whole number from 0 to below 2**62."""
        return self.size(key, self._value.get(key))

    def size(self, what: str, value: Any) -> int:
        """Return ``value``, called ``what``, which must be a whole number from 0 to below 2**62."""
        if type(value) is not int or not 0 <= value < NUMBER_LIMIT:
            self.fail(f"has a {what!r} that is no whole number in range")
        return value

    def plain_name(self, what: str, value: Any) -> str:
        """Return ``value``, called ``what``, which must be a file name that cannot lead out of its directory: it has no
        separators, no leading dot or dash, and no control characters."""
        if not isinstance(value, str) or not _NAME.match(value):
            self.fail(f"has a {what!r} that is no plain file name: {value!r:.80}")
        return value

    def file_name(self, value: Any) -> str:
        """Return ``value``, which must be a plain name, with at most two directories of plain names before it."""
        parts = value.split("/") if isinstance(value, str) else [value]
        if len(parts) > _MAX_DEPTH:
            self.fail(f"has a file name that is too deep: {value!r:.80}")
        for part in parts:
            self.plain_name("file name", part)
        return str(value)


def parse_files(body: Body, digest: str) -> tuple[FileRecord, ...]:
    """Return the records of ``files``, whose digests are of the algorithm ``digest``. Every file is covered by its
    extents, without gap or overlap."""
    records: list[FileRecord] = []
    hex_digits = re.compile(rf"[0-9a-f]{{{digests.hex_length(digest)}}}\Z")
    content_digest = re.compile(rf"({SPLIT_MARK})?({hex_digits.pattern})")
    for entry in body.take("files", list):
        item = Body(entry, body.where)
        name = item.file_name(item.take("name", str))
        nbytes = item.whole("nbytes")
        extents: list[ExtentRecord] = []
        position = 0
        for row in item.take("extents", list):
            if not isinstance(row, list) or len(row) not in (3, 5):
                body.fail(f"has a malformed extent of {name!r}")
            offset, length = body.size("offset", row[0]), body.size("nbytes", row[1])
            if offset != position or (length == 0 and nbytes) or offset + length > nbytes:
                body.fail(f"has extents of {name!r} that overlap, leave a gap or pass its end")
            if length > MAX_EXTENT_BYTES:
                body.fail(f"has an extent of {name!r} of {length} bytes, over the limit of {MAX_EXTENT_BYTES}")
            if not isinstance(row[2], str) or not hex_digits.match(row[2]):
                body.fail(f"has a malformed digest of {name!r}")
            content, stored = None, 0
            if len(row) == 5:
                text, stored = row[3], body.size("stored", row[4])
                match = content_digest.match(text) if isinstance(text, str) else None
                if match is None and text != "":
                    body.fail(f"has a malformed content digest of {name!r}")
                content = None if match is None else ContentDigest(match[2], match[1] is not None)
                if stored > length:
                    body.fail(f"has an extent of {name!r} that holds more than its bytes")
            extents.append(ExtentRecord(offset, length, row[2], content, stored))
            position += length
        if position != nbytes or not extents:
            body.fail(f"has extents that do not cover {name!r}")
        plan = entry.get("plan", "")
        if not isinstance(plan, str):
            body.fail(f"has a malformed plan of {name!r}")
        bases = entry.get("bases", [])
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            body.fail(f"has malformed bases of {name!r}")
        order = entry.get("order", [])
        if not isinstance(order, list) or not all(type(number) is int for number in order):
            body.fail(f"has a malformed order of {name!r}")
        if order and sorted(order) != list(range(1, len(extents))):
            body.fail(f"has a malformed order of {name!r}")
        records.append(FileRecord(name, nbytes, tuple(extents), plan, tuple(bases), tuple(order)))
    _check_bases(body, records)
    check_names(body, [record.name for record in records])
    return tuple(records)


def check_names(body: Body, names: Sequence[str]) -> None:
    """Raise ``ManifestInvalid`` where files of these names cannot lie in one directory."""
    folded = [name.casefold() for name in names] + [MANIFEST_FILE]
    if len(set(folded)) != len(folded):
        body.fail("lists a file twice (or two names that differ only in case)")
    folders = {name[:i] for name in folded if "/" in name for i, char in enumerate(name) if char == "/"}
    if not folders.isdisjoint(folded):
        body.fail("lists a name as a file and as a directory")


def extent_of(row: Sequence[Any]) -> ExtentRecord:
    """Return the extent that a row of another rank's report describes; it looks as in the manifest."""
    if len(row) == 3:
        return ExtentRecord(*row)
    offset, nbytes, digest, text, stored = row
    content = ContentDigest(text.removeprefix(SPLIT_MARK), text.startswith(SPLIT_MARK)) if text else None
    return ExtentRecord(offset, nbytes, digest, content, stored)


def _check_bases(body: Body, records: Sequence[FileRecord]) -> None:
    files = {record.name: record for record in records}
    for record in records:
        for name in record.bases:
            base = files.get(name)
            if base is None:
                body.fail(f"has a file {record.name!r} whose base {name!r:.80} it does not list")
            if (
                base.content_key != record.content_key
                or not record.content_key
                or len(base.extents) != len(record.extents)
                or base.bases
            ):
                body.fail(f"has a file {record.name!r} whose base {name!r} does not fit it")
        if len(set(record.bases)) != len(record.bases):
            body.fail(f"has a file {record.name!r} with a base twice")


def parse_components(
    body: Body, files: Mapping[str, FileRecord], parts: PartSource | None = None
) -> dict[str, ComponentRecord]:
    """Return the records of ``components``. Every tensor lies in ``files``, and no two tensors overlap there, or is
    spread over ``parts``, which are not read."""
    found: dict[str, ComponentRecord] = {}
    # what parts describe, they say themselves
    listed = [record for record in files.values() if not isinstance(record, SpreadFile)]
    room = {record.name: len(record.extents) for record in listed}
    for name, entry in body.take("components", dict).items():
        if "." in body.plain_name("component name", name):
            body.fail(f"has the component name {name!r:.80}, which no tensor's name could be told apart by")
        item = Body(entry, body.where)
        if parts is not None and item.optional("part", None) is not None:
            rank = item.whole("part")
            if rank >= parts.ranks:
                body.fail(f"finds the component {name:.80} in the part of a rank that there is not")
            found[name] = OwnComponent(item.take("kind", str), parts, rank, name)
            continue
        rows = item.take("tensors", dict)
        tensors = table_of(rows, files) or _tensors(body, name, rows, files, room, parts)
        if parts is not None and _spread_bytes(tensors) > parts.component_bytes(name):
            body.fail(f"spreads tensors of {name!r:.80} over files that are smaller than these")
        aliases = item.take("aliases", dict)
        for alias, target in aliases.items():
            if not isinstance(target, str) or target not in tensors or alias in tensors:
                body.fail(f"has the alias {alias!r:.80} for a tensor that is not there")
        strides = _strides(body, item.optional("strides", {}), tensors)
        found[name] = ComponentRecord(item.take("kind", str), tensors, aliases, item.text("class"), strides)
    problem = overlap_problem(found)
    if problem is not None:
        body.fail(problem)
    return found


def _tensors(
    body: Body,
    component: str,
    rows: Mapping[str, Any],
    files: Mapping[str, FileRecord],
    room: dict[str, int],
    parts: PartSource | None,
) -> dict[str, StoredTensor]:
    """Return the records of tensors, row by row; see ``_chunked`` for ``room``."""
    found: dict[str, StoredTensor] = {}
    for name, row in rows.items():
        if parts is not None and isinstance(row, dict) and "spread" in row:
            found[name] = _spread_tensor(body, component, name, row, parts)
        elif isinstance(row, dict) and "boxes" in row:
            found[name] = _boxed(body, name, row, files)
        elif isinstance(row, dict):
            found[name] = _chunked(body, name, row, files, room)
        else:
            found[name] = tensor_of(body, name, row, files)
    return found


def _spread_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, SpreadRecord))


def _spread_tensor(body: Body, component: str, name: str, row: Mapping[str, Any], parts: PartSource) -> SpreadRecord:
    dtype, shape, nbytes = _dense(body, name, row.get("dtype"), row.get("shape"))
    number = body.size(f"spread of {name:.80}", row["spread"])
    if number >= len(parts.spreads) or parts.spreads[number].bounds[-1] != (shape[0] if shape else 1):
        body.fail(f"spreads tensor {name!r:.80} in a way that does not fit it")
    copies = row.get("copies")
    if copies is not None:
        if (
            not isinstance(copies, list)
            or [type(one) for one in copies] != [int, int]
            or not 0 <= copies[0] <= copies[1]
        ):
            body.fail(f"has malformed copies of tensor {name!r:.80}")
        copies = copies[0], copies[1]
    return SpreadRecord(dtype, shape, nbytes, parts, component, name, number, copies)


def _strides(body: Body, rows: Any, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Return the strides of the tensors that were not row-major in memory. They must be those of a dense tensor: others
    would make whoever allocates it take more memory than the tensor has, or write to one place twice."""
    if not isinstance(rows, dict):
        body.fail("has malformed strides")
    found: dict[str, tuple[int, ...]] = {}
    for name, row in rows.items():
        if name not in tensors or not isinstance(row, list) or len(row) != len(tensors[name].shape):
            body.fail(f"has strides of {name!r:.80} that fit no tensor")
        strides = tuple(body.size(f"stride of {name:.80}", stride) for stride in row)
        if not is_dense(tensors[name].shape, strides):
            body.fail(f"has strides of {name!r:.80} that leave gaps or overlap")
        found[name] = strides
    return found


def _dense(body: Body, name: str, dtype: Any, shape: Any) -> tuple[str, tuple[int, ...], int]:
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        body.fail(f"gives tensor {name!r:.80} the unknown dtype {dtype!r:.20}")
    if not isinstance(shape, list) or len(shape) > 64:
        body.fail(f"gives tensor {name!r:.80} a malformed shape")
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= body.size(f"shape of {name:.80}", size)
    return dtype, tuple(shape), nbytes


def tensor_of(body: Body, name: str, row: Any, files: Mapping[str, FileRecord]) -> TensorRecord:
    """Return the record of a whole tensor, ``[dtype, shape, file, begin, end]``."""
    if not isinstance(row, list) or len(row) != 5:
        body.fail(f"has a malformed entry for tensor {name!r:.80}")
    dtype, shape, nbytes = _dense(body, name, row[0], row[1])
    file, begin, end = row[2:]
    if not isinstance(file, str) or file not in files:
        body.fail(f"puts tensor {name!r:.80} into a file it does not list")
    begin, end = body.size("begin", begin), body.size("end", end)
    if end > files[file].nbytes or end - begin != nbytes or begin % ITEM_BYTES[dtype]:
        body.fail(f"gives tensor {name!r:.80} a byte range that does not fit its shape or its file")
    return TensorRecord(dtype, shape, file, begin, end)


def _chunked(body: Body, name: str, row: Any, files: Mapping[str, FileRecord], room: dict[str, int]) -> ChunkedRecord:
    """Return the record of a chunked tensor. ``room`` counts the extents of each file that are not a chunk yet: thirty
    characters can name millions of extents, and without it could do so again and again."""
    item = Body(row, body.where)
    dtype, shape, nbytes = _dense(body, name, item.take("dtype", str), item.take("shape", list))
    chunk, run = item.whole("chunk"), item.whole("run")
    if chunk > MAX_CHUNK_BYTES:
        body.fail(f"gives tensor {name!r:.80} chunks of {chunk} bytes, over the limit of {MAX_CHUNK_BYTES}")
    if nbytes and (not chunk or not run or nbytes % run or chunk % ITEM_BYTES[dtype] or run % ITEM_BYTES[dtype]):
        body.fail(f"gives tensor {name!r:.80} chunks that do not fit its shape")
    parts = [_part(body, name, part, files, room) for part in item.take("parts", list)]
    if len({part.file for part in parts}) != len(parts):
        body.fail(f"has two parts of tensor {name!r:.80} in one file")
    count = nbytes // run * -(-run // chunk) if nbytes else 0
    if sum(len(part.extents) for part in parts) != count:
        body.fail(f"lacks chunks of tensor {name!r:.80}, or has more than it should")
    record = ChunkedRecord(dtype, shape, nbytes, chunk, run, item.take("padded", bool), tuple(parts))
    number = 0
    for part in parts:
        for extent in part.extents:
            found = files[part.file].extents[extent]
            expected = chunk if record.padded else record.span(number)[1]
            if not found.content and (found.payload_bytes or found.nbytes) != expected:
                body.fail(f"has a chunk of tensor {name!r:.80} of the wrong size")
            number += 1
    return record


def _boxed(body: Body, name: str, row: Any, files: Mapping[str, FileRecord]) -> BoxedRecord:
    item = Body(row, body.where)
    dtype, shape, nbytes = _dense(body, name, item.take("dtype", str), item.take("shape", list))
    boxes: list[BoxRecord] = []
    for entry in item.take("boxes", list):
        if not isinstance(entry, list) or len(entry) != 5 or not isinstance(entry[0], list):
            body.fail(f"has a malformed box of tensor {name!r:.80}")
        part = tensor_of(body, name, [dtype, *entry[1:]], files)
        offsets = tuple(body.size(f"offset of {name:.80}", offset) for offset in entry[0])
        if len(offsets) != len(shape) or len(part.shape) != len(shape):
            body.fail(f"has a box of tensor {name!r:.80} with other dimensions")
        if any(offset + size > whole for offset, size, whole in zip(offsets, part.shape, shape, strict=True)):
            body.fail(f"has a box of tensor {name!r:.80} outside of it")
        boxes.append(BoxRecord(offsets, part.shape, part.file, part.begin, part.end))
    if sum(box.end - box.begin for box in boxes) != nbytes or not apart(boxes):
        body.fail(f"has boxes of tensor {name!r:.80} that leave gaps, overlap, or are too many")
    return BoxedRecord(dtype, shape, nbytes, tuple(boxes))


def _part(body: Body, name: str, row: Any, files: Mapping[str, FileRecord], room: dict[str, int]) -> PartRecord:
    if not isinstance(row, list) or len(row) not in (2, 3) or not isinstance(row[0], str) or row[0] not in room:
        body.fail(f"puts chunks of tensor {name!r:.80} into a file it does not list")
    most = len(files[row[0]].extents)
    numbers: Sequence[Any] = ()
    if len(row) == 3:
        first, count = body.size("extent", row[1]), body.size("count", row[2])
        numbers = range(first, first + min(count, most + 1))
    elif isinstance(row[1], list):
        numbers = row[1]
    room[row[0]] -= len(numbers)
    if not numbers or room[row[0]] < 0 or not all(body.size("extent", i) < most for i in numbers):
        body.fail(f"has chunks of tensor {name!r:.80} in extents that are not there, or are chunks already")
    if files[row[0]].bases and 0 in numbers:
        body.fail(f"has a chunk of tensor {name!r:.80} in the header of {row[0]!r}")
    return PartRecord(row[0], tuple(numbers))


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a number that a float can hold: JSON's whole numbers have no limit."""
    return type(value) is float or (type(value) is int and abs(value) < NUMBER_LIMIT)
