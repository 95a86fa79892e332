"""The manifest is the JSON file, written last, that lists every file, extent, digest and tensor. It *is* the
checkpoint.

The file ends with a digest of everything before it, so no bit of it can flip unseen. It may come from an attacker:
every field is checked before anything is allocated or opened because of it. docs/format.md describes the schema.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable
from typing import Any, Final

from asyncckpt.codecs import codecs, digests
from asyncckpt.errors import (
    CheckpointDamaged,
    DigestMismatch,
    InvalidOption,
    ManifestInvalid,
    UnknownName,
    VersionUnsupported,
)
from asyncckpt.jsontree import dumps, loads, version_of
from asyncckpt.manifest.component_rows import component_rows
from asyncckpt.manifest.given import parse_assets, parse_derived, parse_names
from asyncckpt.manifest.parse import SPLIT_MARK, Body, is_number, parse_components, parse_files
from asyncckpt.manifest.parts import ReadSmall, joined_files, parse_parts, parts_json
from asyncckpt.manifest.pieces import dumps_in_pieces
from asyncckpt.manifest.records import (
    ExtentRecord,
    FileRecord,
    Manifest,
)
from asyncckpt.manifest.spread import SpreadFile
from asyncckpt.manifest.unread import UnreadComponents, heads_of
from asyncckpt.memory.gc_pause import gc_paused
from asyncckpt.protocols import Reader
from asyncckpt.types import MANIFEST_FILE, ContentDigest, JsonValue

log = logging.getLogger("asyncckpt")

FORMAT_NAME: Final = "asyncckpt"
#: This library reads format versions up to this one. A manifest gives the oldest version that a reader must know: 1
#: where every tensor is whole, 2 where some are chunked, 3 where some lie in boxes, 4 where plain values are of kinds
#: that older readers do not know, 5 where the manifest is in parts.
FORMAT_VERSION: Final = 5
_PARTS_VERSION: Final = 5
FILE_NAME: Final = MANIFEST_FILE
#: This file holds the plain values of every component.
STATE_FILE: Final = "state.json"
#: Plain values are small: a larger file is not one that this library wrote.
MAX_STATE_BYTES: Final = 1 << 30
#: Ten million tensors fit into so many bytes; a larger manifest is taken for an attack.
MAX_MANIFEST_BYTES: Final = 2 << 30
_SELF_DIGEST: Final = "xxh3-128"
_REMEMBERED_BYTES: Final = 1 << 20
#: A manifest of so many bytes is parsed in a millisecond, and as a whole.
_SMALL_BYTES: Final = 1 << 16


@gc_paused()
def encode(manifest: Manifest, *, components_json: bytes | None = None) -> bytes:
    """Return the bytes of the manifest's file. ``components_json`` is the text of its components, where that is known
    from the save before: to encode it again would take long. Without it, a manifest in parts becomes a whole one, which
    reads all parts."""
    components = components_json
    parts = manifest.parts if components is not None else None
    files = [record for record in manifest.files if not isinstance(record, SpreadFile) or parts is None]
    if manifest.parts is not None:
        of_parts = manifest.parts.names()
        files = [record for record in files if record.name not in of_parts]
    if components is None:
        components = dumps_in_pieces(component_rows(manifest.components))
    plain = manifest.codec == "none" and b'"parts":' not in components and b'"boxes":' not in components
    version = max(3 if b'"boxes":' in components else 1 if plain else 2, manifest.least_version)
    if parts is not None:
        version = max(version, _PARTS_VERSION)
    body: dict[str, Any] = {
        "format": FORMAT_NAME,
        "format_version": version,
        "step": manifest.step,
        "name": manifest.name,
        "attempt": manifest.attempt,
        **({"sequence": manifest.sequence} if manifest.sequence else {}),
        **({"parent": manifest.parent} if manifest.parent else {}),
        **({"names": list(manifest.names)} if manifest.names else {}),
        "kind": manifest.kind,
        "created_unix_seconds": manifest.created_unix_seconds,
        "world_size": manifest.world_size,
        "shard_format": manifest.shard_format,
        "digest": manifest.digest,
        "layout": manifest.layout,
        "metrics": {name: metric_to_json(value) for name, value in manifest.metrics.items()},
        "config": manifest.config,
        "environment": dict(manifest.environment),
        "files": [file_to_json(record) for record in files],
        **({"assets": list(manifest.assets)} if manifest.assets else {}),
        **({"derived": dict(manifest.derived)} if manifest.derived else {}),
    }
    if version > 1:
        body["codec"] = {"name": manifest.codec, "options": dict(manifest.codec_options)}
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    beside = parts_json(parts) if parts is not None else b""
    return seal(b"".join((text[:-1].encode(), beside, b',"components":', components)))


def version_of_values(state: bytes, config: JsonValue) -> int:
    """Return the oldest format version that knows all plain values of a checkpoint: those in the file ``state.json``,
    whose bytes these are, and the user's ``config``."""
    return max(version_of(state), 1 if config is None else version_of(dumps(config)))


def file_to_json(record: FileRecord) -> dict[str, Any]:
    """Return the row of ``files`` for this record, as values for JSON."""
    rows = [
        [e.offset, e.nbytes, e.digest]
        if e.content is None and not e.payload_bytes
        else [e.offset, e.nbytes, e.digest, _content_text(e.content), e.payload_bytes]
        for e in record.extents
    ]
    body: dict[str, Any] = {"name": record.name, "nbytes": record.nbytes, "extents": rows}
    if record.content_key:
        body["plan"] = record.content_key
    if record.bases:
        body["bases"] = list(record.bases)
    if record.order:
        body["order"] = list(record.order)
    return body


def _content_text(content: ContentDigest | None) -> str:
    if content is None:
        return ""
    return SPLIT_MARK + content.hex if content.split else content.hex


def seal(body: bytes) -> bytes:
    """Append the digest of ``body`` to it and close the object. ``body`` is an object's text without its last brace."""
    return body + f',"manifest_digest":"{_SELF_DIGEST}:{digests.get(_SELF_DIGEST)(body)}"}}\n'.encode()


@gc_paused()
def decode(data: bytes, where: str, *, whole: bool = True, read: ReadSmall | None = None) -> Manifest:
    """Parse the bytes of a manifest's file. ``whole``: with False, the components, which take nearly all of the time,
    are parsed and checked when they are first looked at, if they come last in the text. ``read``: reads the parts of a
    manifest that has any, once something is asked of them; nothing can be without it.

    Raises ``ManifestInvalid``, which names the file as ``where``, for anything damaged or malformed, and
    ``VersionUnsupported`` for a newer format version or an unknown codec. Nothing is opened, and no memory is allocated
    but for the parsed text.
    """
    cut = data.rfind(b',"manifest_digest":"')
    if cut < 0 or seal(data[:cut]) != data:
        raise ManifestInvalid(f"{where}: the manifest is damaged or incomplete: its digest does not match its content")
    head = None if whole else _head(data[:cut], where)
    body = Body(_parse(data, where) if head is None else head, where)
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
    parts = parse_parts(body, digest, read) if version >= _PARTS_VERSION else None
    files = parse_files(body, digest)
    if parts is not None:
        files = joined_files(body, files, parts)
    by_name = {record.name: record for record in files}
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
        metrics={name: metric_from_json(value, body) for name, value in body.take("metrics", dict).items()},
        config=body.take("config", object),
        environment=body.take("environment", dict),
        files=files,
        components=parse_components(body, by_name, parts)
        if head is None
        else UnreadComponents(lambda: _known(data, where, read).components),
        codec=codec,
        codec_options=codec_options,
        size_bytes=len(data),
        file_digest=file_digest(data),
        sequence=body.size("sequence", body.optional("sequence", 0)),
        parent=body.text("parent"),
        names=parse_names(body),
        assets=parse_assets(body, by_name),
        derived=parse_derived(body),
        least_version=version,
        parts=parts,
    )
    if manifest.kind not in ("full", "weights"):
        body.fail(f"names the unknown kind {manifest.kind!r:.80}")
    return manifest


def file_digest(data: bytes) -> str:
    """Return ``sha256:`` and the SHA-256 of the manifest's whole file, which ``expect_digest`` is compared with. The
    digest inside the manifest would not do: it finds damage, but anyone can compute it for other content."""
    return f"sha256:{digests.get('sha256')(data)}"


def check_expected(expect_digest: str | None) -> str | None:
    """Return ``expect_digest`` in the form that ``file_digest`` has, or None where there is none. Raises
    ``InvalidOption`` where it is not a SHA-256."""
    if expect_digest is None:
        return None
    digits = expect_digest.lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise InvalidOption(
            f"expect_digest={expect_digest!r:.100}: give sha256: and 64 hex digits, as `show` prints them"
        )
    return f"sha256:{digits}"


def check_digest(manifest: Manifest, expect_digest: str | None, path: str) -> None:
    """Refuse a manifest that is not the one expected; ``path`` is the checkpoint's. Raises ``DigestMismatch``, and
    ``InvalidOption`` for what is no SHA-256."""
    expected = check_expected(expect_digest)
    if expected is None:
        return
    if manifest.file_digest != expected:
        raise _mismatch(path, manifest.file_digest, expected)
    if not digests.is_cryptographic(manifest.digest):
        log.warning(
            "%s: the manifest is the one expected, but its %s digests do not bind the data against forgery; save with "
            "digest='blake3' or 'sha256'",
            path,
            manifest.digest,
        )


def _mismatch(path: str, found: str, expected: str) -> DigestMismatch:
    return DigestMismatch(
        f"{path}/{FILE_NAME}: its digest is {found}, and {expected} was expected: this is another checkpoint, or it "
        f"was changed"
    )


def load(
    reader: Reader, expect_digest: str | None = None, *, whole: Callable[[bytes], bool] = lambda _data: True
) -> Manifest:
    """Return the manifest of an open checkpoint. ``whole``: is given the file's bytes, and says whether all of it is to
    be parsed now (see ``decode``). Blocks on the disk. Raises ``DigestMismatch``, before it looks at the
    content, where the file's digest is not ``expect_digest``; ``ManifestInvalid`` where the file is missing or is not a
    regular file; and what ``decode`` raises."""
    expected = check_expected(expect_digest)
    try:
        data = reader.read_small(FILE_NAME, MAX_MANIFEST_BYTES)
    except CheckpointDamaged as error:
        raise ManifestInvalid(f"{error}; this directory is no complete checkpoint") from error
    if expected is not None and file_digest(data) != expected:
        raise _mismatch(reader.path, file_digest(data), expected)
    where = f"{reader.path}/{FILE_NAME}"
    parse_all = len(data) <= _SMALL_BYTES or whole(data)
    read = reader.read_small
    manifest = _known(data, where, read) if parse_all else decode(data, where, whole=False, read=read)
    check_digest(manifest, expected, reader.path)
    return manifest


def _known(data: bytes, where: str, read: ReadSmall | None) -> Manifest:
    known = _remembered(data, where) if len(data) <= _REMEMBERED_BYTES else None
    if known is None or known.parts is not None:  # parts are read by whoever has the checkpoint open
        return decode(data, where, read=read)
    return known


def _head(body: bytes, where: str) -> JsonValue:
    """Return what stands before the components, or None where it cannot be told apart from them."""
    for text in heads_of(body):
        with contextlib.suppress(ManifestInvalid):
            return _parse(text, where)
    return None


@functools.lru_cache(maxsize=1)
def _remembered(data: bytes, where: str) -> Manifest:
    """Return what ``decode`` returns, and remember the last manifest: whoever lists a run often reads what is newest in
    it right away, as the first save after a resume does."""
    return decode(data, where)


def _parse(data: bytes, where: str) -> JsonValue:
    try:
        return loads(data, where)
    except ValueError as error:
        raise ManifestInvalid(str(error)) from error


def _codec(body: Body) -> tuple[str, dict[str, Any]]:
    item = Body(body.take("codec", dict), body.where)
    name, options = item.take("name", str), item.take("options", dict)
    try:
        codecs.get(name, options)
    except (UnknownName, InvalidOption) as error:
        raise VersionUnsupported(
            f"{body.where}: written with a codec this asyncckpt does not know ({error!s:.200}). Upgrade: "
            f"pip install -U asyncckpt"
        ) from error
    return name, options


def metric_to_json(value: float) -> JsonValue:
    """Return a metric as JSON has it: not-a-number and infinities are text."""
    return value if value == value and abs(value) != float("inf") else repr(value)


def metric_from_json(value: Any, body: Body) -> float:
    """Return the metric that ``metric_to_json`` has written. Raises ``ManifestInvalid`` for anything else."""
    if value in ("nan", "inf", "-inf") or is_number(value):
        return float(value)
    return body.fail("has a metric that is no number")


def whole_file(name: str, data: bytes, digest: Callable[[Any], str]) -> FileRecord:
    """Return the record of a small file, which is one extent from its first byte to its last."""
    return FileRecord(name, len(data), (ExtentRecord(0, len(data), digest(data)),))
