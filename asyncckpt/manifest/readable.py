"""A manifest is read by the reader's own parser before it is published: what would be refused later fails its save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncckpt.errors import CheckpointDamaged, SaveFailed
from asyncckpt.manifest.json import MAX_MANIFEST_BYTES, decode, encode
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.manifest.spread import SpreadFile


def check_readable(draft: Manifest, data: bytes, components_json: bytes | None, known: dict[str, Any]) -> None:
    """Raise ``SaveFailed`` where a reader would refuse the manifest with the bytes ``data``, which ``encode`` made of
    ``draft`` and ``components_json``.

    ``known`` keeps the components that were read last, with all that their meaning depends on: where they are the same
    again, only the rest is parsed, without parts: what the root says of these was checked before (``merge_parts``). To
    parse many components keeps every other thread waiting."""
    where = f"step {draft.step}: the manifest of {draft.name}"
    if len(data) > MAX_MANIFEST_BYTES:
        raise SaveFailed(
            f"{where} has {len(data)} bytes, and readers take up to {MAX_MANIFEST_BYTES}. Nothing was published: save "
            f"fewer tensors, or larger extents (extent_bytes, chunk_bytes)"
        )
    try:
        if components_json is None:
            decode(data, where)
            return
        parts = tuple(part.files for part in draft.parts.listed) if draft.parts is not None else ()
        names = tuple(tuple((name, component) for name, _, component in files) for files in parts)
        proven = components_json, tuple(map(_shape_of, draft.files)), names
        if known.get("readable") == proven:
            rest = draft if draft.parts is None else replace(draft, files=_listed_by_root(draft), parts=None)
            decode(encode(rest, components_json=b"{}"), where)
        else:
            decode(data, where)
            known["readable"] = proven
    except CheckpointDamaged as error:
        raise SaveFailed(
            f"{error}: no reader would take it, so nothing was published. Earlier checkpoints are untouched; this is a "
            f"fault of this library or of a name or number in the state"
        ) from error


def _listed_by_root(draft: Manifest) -> tuple[FileRecord, ...]:
    parts = draft.parts.names() if draft.parts is not None else ()
    return tuple(one for one in draft.files if not isinstance(one, SpreadFile) and one.name not in parts)


def _shape_of(record: FileRecord) -> Any:
    """Return all of a file's record that decides whether tensors may lie in it: not its digests, nor the sizes of its
    encoded chunks. Nothing where a part of the manifest describes it: then no tensor of the root lies in it."""
    if isinstance(record, SpreadFile):
        return None
    sizes = tuple(0 if extent.content else extent.payload_bytes or extent.nbytes for extent in record.extents)
    nbytes = 0 if record.content_key else record.nbytes
    return record.name, nbytes, record.content_key, record.bases, record.order, sizes
