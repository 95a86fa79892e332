"""The manifest: the JSON file, written last, that lists every file, extent, digest and tensor. It *is* the checkpoint.

The file ends with a digest of everything before it, compared byte for byte, so no bit of it can flip unseen. What is
parsed here may come from an attacker: every field is checked before anything is allocated or opened by it. The
schema is described in docs/format.md.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from asyncckpt import codecs, digests
from asyncckpt.codecs import SPLIT_MARK
from asyncckpt.dtypes import ITEM_BYTES
from asyncckpt.errors import (
    CheckpointDamaged,
    DigestMismatch,
    InvalidOption,
    ManifestInvalid,
    UnknownName,
    VersionUnsupported,
)
from asyncckpt.plain import loads
from asyncckpt.protocols import Chunking, JsonValue, Layout, Reader
from asyncckpt.records import (
    BoxedRecord,
    BoxRecord,
    ChunkedRecord,
    ComponentRecord,
    ExtentRecord,
    FileRecord,
    Manifest,
    PartRecord,
    StoredTensor,
    TensorRecord,
)

log = logging.getLogger("asyncckpt")

FORMAT_NAME: Final = "asyncckpt"
#: What this version reads; a manifest says the oldest that can read it: 1 where every tensor is whole, 2 where some are
#: chunked, 3 where some lie in boxes.
FORMAT_VERSION: Final = 3
FILE_NAME: Final = "manifest.json"
#: The plain values of every component.
STATE_FILE: Final = "state.json"
#: Room for ten million tensors; more is taken for an attack.
MAX_MANIFEST_BYTES: Final = 2 << 30
#: A chunk is decoded into memory as a whole, and an extent is read as a whole.
MAX_CHUNK_BYTES: Final = 1 << 30
MAX_EXTENT_BYTES: Final = 1 << 30
_SELF_DIGEST: Final = "xxh3-128"
_NAME: Final = re.compile(r"[A-Za-z0-9_=][A-Za-z0-9._=+-]{0,254}\Z")
#: Directories in a file's name.
_MAX_DEPTH: Final = 3
_LIMIT: Final = 1 << 62
#: Pairs of boxes of one tensor that are compared: far more than a grid of a hundred thousand needs.
_MAX_COMPARED: Final = 20_000_000


def is_component_name(name: str) -> bool:
    """Whether a component can have this name."""
    return _NAME.match(name) is not None and "." not in name


def components_of(
    layout: Layout,
    kinds: Mapping[str, str],
    aliases: Mapping[str, Mapping[str, str]],
    orders: Mapping[str, Sequence[int]],
) -> Any:
    """The manifest's ``components`` for a layout: ``{name: {kind, tensors, aliases}}`` as JSON. ``orders[file]`` says
    which of the file's extents each extent of the layout became."""
    body: dict[str, Any] = {
        name: {"kind": kind, "tensors": {}, "aliases": dict(aliases.get(name, {}))} for name, kind in kinds.items()
    }
    for shard in layout.shards:
        tensors = body[shard.component]["tensors"]
        for placement in shard.placements:
            spec = placement.spec
            tensors[spec.name] = [spec.dtype, list(spec.shape), shard.file, placement.begin, placement.end]
        for run in shard.runs:
            row = tensors.setdefault(run.tensor.spec.name, _chunked_row(run.tensor))
            if run.count:
                chosen = orders[shard.file][run.first : run.first + run.count]
                row["parts"].append(_part_row(PartRecord(shard.file, tuple(chosen))))
    return body


def _chunked_row(tensor: Chunking | ChunkedRecord) -> dict[str, Any]:
    spec = tensor.spec if isinstance(tensor, Chunking) else tensor
    return {
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "chunk": tensor.chunk_bytes,
        "run": tensor.run_bytes,
        "padded": tensor.padded,
        "parts": [],
    }


def _part_row(part: PartRecord) -> list[Any]:
    first, count = part.extents[0], len(part.extents)
    if part.extents == tuple(range(first, first + count)):
        return [part.file, first, count]
    return [part.file, list(part.extents)]


def encode(manifest: Manifest, *, components_json: str | None = None) -> bytes:
    """The file's bytes. ``components_json`` spares re-encoding what did not change since the last save."""
    components = components_json if components_json is not None else json.dumps(_components_json(manifest.components))
    plain = manifest.codec == "none" and '"parts":' not in components and '"boxes":' not in components
    body: dict[str, Any] = {
        "format": FORMAT_NAME,
        "format_version": 3 if '"boxes":' in components else 1 if plain else 2,
        "step": manifest.step,
        "name": manifest.name,
        "attempt": manifest.attempt,
        "kind": manifest.kind,
        "created_unix_seconds": manifest.created_unix_seconds,
        "world_size": manifest.world_size,
        "shard_format": manifest.shard_format,
        "digest": manifest.digest,
        "layout": manifest.layout,
        "metrics": {name: _metric_to_json(value) for name, value in manifest.metrics.items()},
        "config": manifest.config,
        "environment": dict(manifest.environment),
        "files": [file_to_json(record) for record in manifest.files],
    }
    if not plain:
        body["codec"] = {"name": manifest.codec, "options": dict(manifest.codec_options)}
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    return seal(f'{text[:-1]},"components":{components}'.encode())


def file_to_json(record: FileRecord) -> dict[str, Any]:
    """A row of ``files``."""
    rows = [
        [e.offset, e.nbytes, e.digest, e.content, e.stored] if e.content or e.stored else [e.offset, e.nbytes, e.digest]
        for e in record.extents
    ]
    body: dict[str, Any] = {"name": record.name, "nbytes": record.nbytes, "extents": rows}
    if record.plan:
        body["plan"] = record.plan
    if record.bases:
        body["bases"] = list(record.bases)
    if record.order:
        body["order"] = list(record.order)
    return body


def seal(body: bytes) -> bytes:
    """Append the digest of ``body``, an object's text without its closing brace."""
    return body + f',"manifest_digest":"{_SELF_DIGEST}:{digests.get(_SELF_DIGEST)(body)}"}}\n'.encode()


def decode(data: bytes, where: str) -> Manifest:
    """The manifest in these bytes.

    Raises ``ManifestInvalid`` naming ``where`` on any damage or anything malformed, ``VersionUnsupported`` for a newer
    format version. Nothing is opened, and nothing is allocated beyond the parsed text.
    """
    cut = data.rfind(b',"manifest_digest":"')
    if cut < 0 or seal(data[:cut]) != data:
        raise ManifestInvalid(f"{where}: the manifest is damaged or incomplete: its digest does not match its content")
    body = _Body(_parse(data, where), where)
    if body.take("format", str) != FORMAT_NAME:
        body.fail("is not of this library's format")
    version = body.take("format_version", int)
    if version > FORMAT_VERSION or version < 1:
        raise VersionUnsupported(
            f"{where}: format version {version}; this asyncckpt reads up to {FORMAT_VERSION}. Upgrade: "
            f"pip install -U asyncckpt"
        )
    digest = body.take("digest", str)
    if digest not in digests.names():
        body.fail(f"names the unknown digest algorithm {digest!r:.80}")
    files = _files(body, digest)
    codec, codec_options = _codec(body) if version > 1 else ("none", {})
    manifest = Manifest(
        step=body.whole("step"),
        name=body.plain_name("name", body.take("name", str)),
        attempt=body.take("attempt", str),
        kind=body.take("kind", str),
        created_unix_seconds=float(body.take("created_unix_seconds", float)),
        world_size=body.whole("world_size"),
        shard_format=body.take("shard_format", str),
        digest=digest,
        layout=body.take("layout", str),
        metrics={name: _metric_from_json(value, body) for name, value in body.take("metrics", dict).items()},
        config=body.take("config", object),
        environment=body.take("environment", dict),
        files=files,
        components=_components(body, {record.name: record for record in files}),
        codec=codec,
        codec_options=codec_options,
        size_bytes=len(data),
        file_digest=file_digest(data),
    )
    if manifest.kind not in ("full", "weights"):
        body.fail(f"names the unknown kind {manifest.kind!r:.80}")
    return manifest


def file_digest(data: bytes) -> str:
    """What ``expect_digest`` is compared with: ``sha256:`` and that of the whole file. The manifest's own digest finds
    damage; anyone can compute it for other content."""
    return f"sha256:{digests.get('sha256')(data)}"


def check_expected(expect_digest: str | None) -> str | None:
    """In the one form that is compared. Raises ``InvalidOption`` for what is no SHA-256."""
    if expect_digest is None:
        return None
    digits = expect_digest.lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise InvalidOption(
            f"expect_digest={expect_digest!r:.100}: give sha256: and 64 hex digits, as `show` prints them"
        )
    return f"sha256:{digits}"


def load(reader: Reader, expect_digest: str | None = None) -> Manifest:
    """The manifest of an open checkpoint. Raises as ``decode`` does, where the file is missing or no file, and, before
    anything in it is looked at, ``DigestMismatch`` where it is not the one expected."""
    expected = check_expected(expect_digest)
    try:
        data = reader.read_small(FILE_NAME, MAX_MANIFEST_BYTES)
    except CheckpointDamaged as error:
        raise ManifestInvalid(f"{error}; this directory is no complete checkpoint") from error
    if expected is not None and file_digest(data) != expected:
        raise DigestMismatch(
            f"{reader.path}/{FILE_NAME}: its digest is {file_digest(data)}, and {expected} was expected: this is "
            f"another checkpoint, or it was changed"
        )
    manifest = decode(data, f"{reader.path}/{FILE_NAME}")
    if expected is not None and not digests.is_cryptographic(manifest.digest):
        log.warning(
            "%s: the manifest is the one expected, but its %s digests do not bind the data against forgery; save with "
            "digest='blake3' or 'sha256'",
            reader.path,
            manifest.digest,
        )
    return manifest


def _parse(data: bytes, where: str) -> JsonValue:
    try:
        return loads(data, where)
    except ManifestInvalid:
        raise
    except ValueError as error:
        raise ManifestInvalid(str(error)) from error


class _Body:
    """Checked access to a parsed object: a wrong type is an error that names the field, never a traceback later."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            self.fail("is no JSON object")
        self._value = value

    def fail(self, problem: str) -> NoReturn:
        raise ManifestInvalid(f"{self.where}: the manifest {problem}")

    def take(self, key: str, kind: type) -> Any:
        if key not in self._value:
            self.fail(f"lacks {key!r}")
        value = self._value[key]
        if kind is float:
            valid = _is_number(value)
        else:
            valid = isinstance(value, kind) and not (kind is int and type(value) is bool)
        if not valid:
            self.fail(f"has a {key!r} of the wrong type")
        return value

    def whole(self, key: str) -> int:
        return self.size(key, self._value.get(key))

    def size(self, what: str, value: Any) -> int:
        if type(value) is not int or not 0 <= value < _LIMIT:
            self.fail(f"has a {what!r} that is no whole number in range")
        return value

    def plain_name(self, what: str, value: Any) -> str:
        """A file name that can go nowhere: no separators, no leading dot or dash, no control characters."""
        if not isinstance(value, str) or not _NAME.match(value):
            self.fail(f"has a {what!r} that is no plain file name: {value!r:.80}")
        return value

    def file_name(self, value: Any) -> str:
        """A plain name, or directories of plain names and one."""
        parts = value.split("/") if isinstance(value, str) else [value]
        if len(parts) > _MAX_DEPTH:
            self.fail(f"has a file name that is too deep: {value!r:.80}")
        for part in parts:
            self.plain_name("file name", part)
        return str(value)


def _codec(body: _Body) -> tuple[str, dict[str, Any]]:
    item = _Body(body.take("codec", dict), body.where)
    name, options = item.take("name", str), item.take("options", dict)
    try:
        codecs.get(name, options)
    except (UnknownName, InvalidOption) as error:
        raise VersionUnsupported(
            f"{body.where}: written with a codec this asyncckpt does not know ({error!s:.200}). Upgrade: "
            f"pip install -U asyncckpt"
        ) from error
    return name, options


def _files(body: _Body, digest: str) -> tuple[FileRecord, ...]:
    records: list[FileRecord] = []
    hex_digits = re.compile(rf"[0-9a-f]{{{digests.hex_length(digest)}}}\Z")
    for entry in body.take("files", list):
        item = _Body(entry, body.where)
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
            content, stored = row[3:] or ("", 0)
            if not isinstance(content, str) or (content and not hex_digits.match(content.removeprefix(SPLIT_MARK))):
                body.fail(f"has a malformed content digest of {name!r}")
            if body.size("stored", stored) > length:
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
    folded = [record.name.casefold() for record in records] + [FILE_NAME]
    if len(set(folded)) != len(folded):
        body.fail("lists a file twice (or two names that differ only in case)")
    folders = {name[:i] for name in folded for i, char in enumerate(name) if char == "/"}
    if not folders.isdisjoint(folded):
        body.fail("lists a name as a file and as a directory")
    return tuple(records)


def _check_bases(body: _Body, records: Sequence[FileRecord]) -> None:
    files = {record.name: record for record in records}
    for record in records:
        for name in record.bases:
            base = files.get(name)
            if base is None:
                body.fail(f"has a file {record.name!r} whose base {name!r:.80} it does not list")
            if base.plan != record.plan or not record.plan or len(base.extents) != len(record.extents) or base.bases:
                body.fail(f"has a file {record.name!r} whose base {name!r} does not fit it")
        if len(set(record.bases)) != len(record.bases):
            body.fail(f"has a file {record.name!r} with a base twice")


def _components(body: _Body, files: Mapping[str, FileRecord]) -> dict[str, ComponentRecord]:
    found: dict[str, ComponentRecord] = {}
    room = {record.name: len(record.extents) for record in files.values()}
    for name, entry in body.take("components", dict).items():
        if "." in body.plain_name("component name", name):
            body.fail(f"has the component name {name!r:.80}, which no tensor's name could be told apart by")
        item = _Body(entry, body.where)
        tensors: dict[str, StoredTensor] = {}
        for tensor, row in item.take("tensors", dict).items():
            if isinstance(row, dict) and "boxes" in row:
                tensors[tensor] = _boxed(body, tensor, row, files)
            elif isinstance(row, dict):
                tensors[tensor] = _chunked(body, tensor, row, files, room)
            else:
                tensors[tensor] = _tensor(body, tensor, row, files)
        aliases = item.take("aliases", dict)
        for alias, target in aliases.items():
            if not isinstance(target, str) or target not in tensors or alias in tensors:
                body.fail(f"has the alias {alias!r:.80} for a tensor that is not there")
        found[name] = ComponentRecord(item.take("kind", str), tensors, aliases)
    _check_overlaps(body, found)
    return found


def _dense(body: _Body, name: str, dtype: Any, shape: Any) -> tuple[str, tuple[int, ...], int]:
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        body.fail(f"gives tensor {name!r:.80} the unknown dtype {dtype!r:.20}")
    if not isinstance(shape, list) or len(shape) > 64:
        body.fail(f"gives tensor {name!r:.80} a malformed shape")
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= body.size(f"shape of {name:.80}", size)
    return dtype, tuple(shape), nbytes


def _tensor(body: _Body, name: str, row: Any, files: Mapping[str, FileRecord]) -> TensorRecord:
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


def _chunked(body: _Body, name: str, row: Any, files: Mapping[str, FileRecord], room: dict[str, int]) -> ChunkedRecord:
    """``room``: how many extents of each file are no chunk yet. A part of thirty characters can name millions."""
    item = _Body(row, body.where)
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
            if not found.content and (found.stored or found.nbytes) != expected:
                body.fail(f"has a chunk of tensor {name!r:.80} of the wrong size")
            number += 1
    return record


def _boxed(body: _Body, name: str, row: Any, files: Mapping[str, FileRecord]) -> BoxedRecord:
    item = _Body(row, body.where)
    dtype, shape, nbytes = _dense(body, name, item.take("dtype", str), item.take("shape", list))
    boxes: list[BoxRecord] = []
    for entry in item.take("boxes", list):
        if not isinstance(entry, list) or len(entry) != 5 or not isinstance(entry[0], list):
            body.fail(f"has a malformed box of tensor {name!r:.80}")
        part = _tensor(body, name, [dtype, *entry[1:]], files)
        offsets = tuple(body.size(f"offset of {name:.80}", offset) for offset in entry[0])
        if len(offsets) != len(shape) or len(part.shape) != len(shape):
            body.fail(f"has a box of tensor {name!r:.80} with other dimensions")
        if any(offset + size > whole for offset, size, whole in zip(offsets, part.shape, shape, strict=True)):
            body.fail(f"has a box of tensor {name!r:.80} outside of it")
        boxes.append(BoxRecord(offsets, part.shape, part.file, part.begin, part.end))
    if sum(box.end - box.begin for box in boxes) != nbytes or not _apart(boxes):
        body.fail(f"has boxes of tensor {name!r:.80} that leave gaps, overlap, or are too many")
    return BoxedRecord(dtype, shape, nbytes, tuple(boxes))


def _apart(boxes: Sequence[BoxRecord]) -> bool:
    """Whether no two share an element: a sweep along the dimension in which they begin at the most places."""
    solid = [box for box in boxes if box.begin < box.end]
    if len(solid) < 2:
        return True
    if not solid[0].shape:
        return False
    along = max(range(len(solid[0].shape)), key=lambda i: len({box.offsets[i] for box in solid}))
    compared = 0
    open_boxes: list[BoxRecord] = []
    for box in sorted(solid, key=lambda box: box.offsets[along]):
        begin = box.offsets[along]
        open_boxes = [other for other in open_boxes if other.offsets[along] + other.shape[along] > begin]
        compared += len(open_boxes)
        if compared > _MAX_COMPARED:
            return False
        for other in open_boxes:
            ranges = zip(box.offsets, box.shape, other.offsets, other.shape, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in ranges):
                return False
        open_boxes.append(box)
    return True


def _part(body: _Body, name: str, row: Any, files: Mapping[str, FileRecord], room: dict[str, int]) -> PartRecord:
    if not isinstance(row, list) or len(row) not in (2, 3) or not isinstance(row[0], str) or row[0] not in files:
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


def _check_overlaps(body: _Body, components: Mapping[str, ComponentRecord]) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {}
    taken: set[tuple[str, int]] = set()
    for component in components.values():
        for tensor in component.tensors.values():
            if isinstance(tensor, ChunkedRecord):
                mine = [(part.file, extent) for part in tensor.parts for extent in part.extents]
                if len(set(mine)) != len(mine) or not taken.isdisjoint(mine):
                    body.fail("has an extent that is two chunks")
                taken.update(mine)
                continue
            for place in tensor.boxes if isinstance(tensor, BoxedRecord) else (tensor,):
                if place.begin < place.end:
                    ranges.setdefault(place.file, []).append((place.begin, place.end))
    if not ranges.keys().isdisjoint(file for file, _ in taken):
        body.fail("has a file with whole tensors and with chunks")
    for file, spans in ranges.items():
        spans.sort()
        if any(after[0] < before[1] for before, after in itertools.pairwise(spans)):
            body.fail(f"has tensors in {file!r} that overlap")


def _components_json(components: Mapping[str, ComponentRecord]) -> Any:
    return {
        name: {
            "kind": component.kind,
            "tensors": {n: _tensor_json(tensor) for n, tensor in component.tensors.items()},
            "aliases": dict(component.aliases),
        }
        for name, component in components.items()
    }


def _tensor_json(tensor: StoredTensor) -> Any:
    if isinstance(tensor, TensorRecord):
        return [tensor.dtype, list(tensor.shape), tensor.file, tensor.begin, tensor.end]
    if isinstance(tensor, BoxedRecord):
        rows = [[list(box.offsets), list(box.shape), box.file, box.begin, box.end] for box in tensor.boxes]
        return {"dtype": tensor.dtype, "shape": list(tensor.shape), "boxes": rows}
    return _chunked_row(tensor) | {"parts": [_part_row(part) for part in tensor.parts]}


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can hold: JSON's ints have no end."""
    return type(value) is float or (type(value) is int and abs(value) < _LIMIT)


def _metric_to_json(value: float) -> JsonValue:
    return value if value == value and abs(value) != float("inf") else repr(value)


def _metric_from_json(value: Any, body: _Body) -> float:
    if value in ("nan", "inf", "-inf") or _is_number(value):
        return float(value)
    return body.fail("has a metric that is no number")


def whole_file(name: str, data: bytes, digest: Callable[[Any], str]) -> FileRecord:
    """The record of a small file: one extent from its first byte to its last."""
    return FileRecord(name, len(data), (ExtentRecord(0, len(data), digest(data)),))
