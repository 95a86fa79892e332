"""The manifest: the JSON file, written last, that lists every file, extent, digest and tensor. It *is* the checkpoint.

The file ends with a digest of everything before it, compared byte for byte, so no bit of it can flip unseen. What is
parsed here may come from an attacker: every field is checked before anything is allocated or opened by it. The
schema is described in docs/format.md.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from asyncckpt import digests
from asyncckpt.dtypes import ITEM_BYTES
from asyncckpt.errors import CheckpointDamaged, ManifestInvalid, VersionUnsupported
from asyncckpt.plain import loads
from asyncckpt.protocols import JsonValue, Layout, Reader

FORMAT_NAME: Final = "asyncckpt"
FORMAT_VERSION: Final = 1
FILE_NAME: Final = "manifest.json"
#: The plain values of every component.
STATE_FILE: Final = "state.json"
#: Room for ten million tensors; more is taken for an attack.
MAX_MANIFEST_BYTES: Final = 2 << 30
_SELF_DIGEST: Final = "xxh3-128"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,254}\Z")
_LIMIT: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class ExtentRecord:
    """A digested byte range of a file."""

    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint, covered from its first byte to its last by extents."""

    name: str
    nbytes: int
    extents: tuple[ExtentRecord, ...]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where a stored tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class ComponentRecord:
    """One component: how it was captured, its stored tensors, and the other names of tied ones."""

    kind: str
    tensors: Mapping[str, TensorRecord]
    aliases: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A whole checkpoint, as recorded. ``metrics`` and ``config`` are the user's; ``environment`` is recorded."""

    step: int
    name: str
    attempt: str
    kind: str
    created_unix_seconds: float
    world_size: int
    shard_format: str
    digest: str
    layout: str
    metrics: Mapping[str, float]
    config: JsonValue
    environment: Mapping[str, JsonValue]
    files: tuple[FileRecord, ...]
    components: Mapping[str, ComponentRecord]
    size_bytes: int = field(default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest's own included."""
        return sum(record.nbytes for record in self.files) + self.size_bytes


def components_of(layout: Layout, kinds: Mapping[str, str], aliases: Mapping[str, Mapping[str, str]]) -> Any:
    """The manifest's ``components`` for a layout: ``{name: {kind, tensors, aliases}}`` as JSON."""
    body: dict[str, Any] = {
        name: {"kind": kind, "tensors": {}, "aliases": dict(aliases.get(name, {}))} for name, kind in kinds.items()
    }
    for shard in layout.shards:
        tensors = body[shard.component]["tensors"]
        for placement in shard.placements:
            spec = placement.spec
            tensors[spec.name] = [spec.dtype, list(spec.shape), shard.file, placement.begin, placement.end]
    return body


def encode(manifest: Manifest, *, components_json: str | None = None) -> bytes:
    """The file's bytes. ``components_json`` spares re-encoding what did not change since the last save."""
    components = components_json if components_json is not None else json.dumps(_components_json(manifest.components))
    body: dict[str, Any] = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
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
        "files": [
            {"name": f.name, "nbytes": f.nbytes, "extents": [[e.offset, e.nbytes, e.digest] for e in f.extents]}
            for f in manifest.files
        ],
    }
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    return seal(f'{text[:-1]},"components":{components}'.encode())


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
        body.fail(f"names the unknown digest algorithm {digest!r}")
    files = _files(body, digest)
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
        components=_components(body, {record.name: record.nbytes for record in files}),
        size_bytes=len(data),
    )
    if manifest.kind not in ("full", "weights"):
        body.fail(f"names the unknown kind {manifest.kind!r}")
    return manifest


def load(reader: Reader) -> Manifest:
    """The manifest of an open checkpoint. Raises as ``decode`` does, and where the file is missing or no file."""
    try:
        data = reader.read_small(FILE_NAME, MAX_MANIFEST_BYTES)
    except CheckpointDamaged as error:
        raise ManifestInvalid(f"{error}; this directory is no complete checkpoint") from error
    return decode(data, f"{reader.path}/{FILE_NAME}")


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
            valid = type(value) in (int, float)
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


def _files(body: _Body, digest: str) -> tuple[FileRecord, ...]:
    records: list[FileRecord] = []
    hex_digits = re.compile(rf"[0-9a-f]{{{digests.hex_length(digest)}}}\Z")
    for entry in body.take("files", list):
        item = _Body(entry, body.where)
        name = item.plain_name("file name", item.take("name", str))
        nbytes = item.whole("nbytes")
        extents: list[ExtentRecord] = []
        position = 0
        for row in item.take("extents", list):
            if not isinstance(row, list) or len(row) != 3:
                body.fail(f"has a malformed extent of {name!r}")
            offset, length = body.size("offset", row[0]), body.size("nbytes", row[1])
            if offset != position or (length == 0 and nbytes) or offset + length > nbytes:
                body.fail(f"has extents of {name!r} that overlap, leave a gap or pass its end")
            if not isinstance(row[2], str) or not hex_digits.match(row[2]):
                body.fail(f"has a malformed digest of {name!r}")
            extents.append(ExtentRecord(offset, length, row[2]))
            position += length
        if position != nbytes or not extents:
            body.fail(f"has extents that do not cover {name!r}")
        records.append(FileRecord(name, nbytes, tuple(extents)))
    folded = [record.name.casefold() for record in records] + [FILE_NAME]
    if len(set(folded)) != len(folded):
        body.fail("lists a file twice (or two names that differ only in case)")
    return tuple(records)


def _components(body: _Body, sizes: Mapping[str, int]) -> dict[str, ComponentRecord]:
    found: dict[str, ComponentRecord] = {}
    for name, entry in body.take("components", dict).items():
        if "." in body.plain_name("component name", name):
            body.fail(f"has the component name {name!r:.80}, which no tensor's name could be told apart by")
        item = _Body(entry, body.where)
        tensors: dict[str, TensorRecord] = {}
        for tensor, row in item.take("tensors", dict).items():
            tensors[tensor] = _tensor(body, tensor, row, sizes)
        aliases = item.take("aliases", dict)
        for alias, target in aliases.items():
            if not isinstance(target, str) or target not in tensors or alias in tensors:
                body.fail(f"has the alias {alias!r} for a tensor that is not there")
        found[name] = ComponentRecord(item.take("kind", str), tensors, aliases)
    _check_overlaps(body, found)
    return found


def _tensor(body: _Body, name: str, row: Any, sizes: Mapping[str, int]) -> TensorRecord:
    if not isinstance(row, list) or len(row) != 5 or not isinstance(row[1], list) or len(row[1]) > 64:
        body.fail(f"has a malformed entry for tensor {name!r:.80}")
    dtype, shape, file, begin, end = row
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        body.fail(f"gives tensor {name!r:.80} the unknown dtype {dtype!r:.20}")
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= body.size(f"shape of {name:.80}", size)
    if not isinstance(file, str) or file not in sizes:
        body.fail(f"puts tensor {name!r:.80} into a file it does not list")
    begin, end = body.size("begin", begin), body.size("end", end)
    if end > sizes[file] or end - begin != nbytes or begin % ITEM_BYTES[dtype]:
        body.fail(f"gives tensor {name!r:.80} a byte range that does not fit its shape or its file")
    return TensorRecord(dtype, tuple(shape), file, begin, end)


def _check_overlaps(body: _Body, components: Mapping[str, ComponentRecord]) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {}
    for component in components.values():
        for tensor in component.tensors.values():
            if tensor.nbytes:
                ranges.setdefault(tensor.file, []).append((tensor.begin, tensor.end))
    for file, spans in ranges.items():
        spans.sort()
        if any(after[0] < before[1] for before, after in itertools.pairwise(spans)):
            body.fail(f"has tensors in {file!r} that overlap")


def _components_json(components: Mapping[str, ComponentRecord]) -> Any:
    return {
        name: {
            "kind": component.kind,
            "tensors": {n: [t.dtype, list(t.shape), t.file, t.begin, t.end] for n, t in component.tensors.items()},
            "aliases": dict(component.aliases),
        }
        for name, component in components.items()
    }


def _metric_to_json(value: float) -> JsonValue:
    return value if value == value and abs(value) != float("inf") else repr(value)


def _metric_from_json(value: Any, body: _Body) -> float:
    if value in ("nan", "inf", "-inf") or type(value) in (int, float):
        return float(value)
    return body.fail("has a metric that is no number")


def whole_file(name: str, data: bytes, digest: Callable[[Any], str]) -> FileRecord:
    """The record of a small file: one extent from its first byte to its last."""
    return FileRecord(name, len(data), (ExtentRecord(0, len(data), digest(data)),))


def shard_records(layout: Layout, found: Sequence[Sequence[str]]) -> list[FileRecord]:
    """The records of a layout's shards; ``found[shard][extent]`` are the digests of the staged bytes."""
    return [
        FileRecord(
            shard.file,
            shard.nbytes,
            tuple(ExtentRecord(e.offset, e.nbytes, d) for e, d in zip(shard.extents, hexes, strict=True)),
        )
        for shard, hexes in zip(layout.shards, found, strict=True)
    ]
