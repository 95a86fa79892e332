"""Opening a checkpoint to use it: its manifest and its plain values, verified."""

from __future__ import annotations

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.json import STATE_FILE
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Reader
from asyncckpt.read.consistency import MAX_STATE_BYTES
from asyncckpt.read.damage import check_files, raise_damage
from asyncckpt.read.extents import read_record, read_small_file
from asyncckpt.types import JsonValue


def open_manifest(reader: Reader, expect_digest: str | None = None) -> Manifest:
    """The checkpoint's manifest, its files present and of the right size, the small ones (those without tensors)
    verified. Raises ``CheckpointDamaged``."""
    manifest = manifests.load(reader, expect_digest)
    raise_damage(reader.path, check_files(reader, manifest))
    shards = {f for component in manifest.components.values() for t in component.tensors.values() for f in t.files}
    for record in manifest.files:
        if record.name not in shards:
            read_record(reader, manifest, record, MAX_STATE_BYTES)
    return manifest


def read_trees(reader: Reader, manifest: Manifest) -> dict[str, JsonValue]:
    """The plain values of every component, verified."""
    trees = jsontree.loads(
        read_small_file(reader, manifest, STATE_FILE, MAX_STATE_BYTES), f"{reader.path}/{STATE_FILE}"
    )
    if not isinstance(trees, dict):
        raise CheckpointDamaged(f"{reader.path}/{STATE_FILE} is no JSON object")
    return trees
