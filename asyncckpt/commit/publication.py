"""The order in which files become a checkpoint stands here, for every writer of this library.

Before ``publish``, the shards and the small files are written and durable. Then: names durable → manifest, last,
durable → its name durable → the attempt gets its name → that durable → only then may the save be acknowledged. See
docs/format.md, "Write ordering".
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace as replaced
from typing import Any

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.misplaced import is_checkpoint
from asyncckpt.errors import StepExists
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.readable import check_readable
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Hold, PendingDirectory, Store, renaming
from asyncckpt.read.verify import verify
from asyncckpt.types import LeaseOptions


def take_over(
    store: Store, *, create_parents: bool = False, takeover: bool = False, options: LeaseOptions | None = None
) -> Hold:
    """Become the run's only writer, and finish what writers before that are gone have begun. Blocks on the storage.
    Raises ``RunLocked`` and ``RunPathError``."""
    if is_checkpoint(store):
        Catalog(store, store.address).entries()  # raises, before anything is written into it
    store.prepare(create_parents=create_parents)
    hold = store.hold(takeover=takeover, options=options)
    try:
        store.reclaim()
        Catalog(store, store.address).settle_replaced()
    except BaseException:
        hold.release()
        raise
    return hold


def begin(store: Store, catalog: Catalog, name: str, step: int, *, overwrite: bool) -> tuple[Hold, PendingDirectory]:
    """Become the run's only writer, and begin a checkpoint of this name; ``overwrite``: also where there is one, which
    stays until the new one is published. The caller discards the directory, or publishes it, and releases the hold.
    Blocks on the storage. Raises ``StepExists``, ``RunLocked`` and ``RunPathError``."""
    if store.listing(name) and not overwrite:  # an empty directory is no checkpoint
        raise StepExists(f"{store.address}/{name} already exists; take another step, or pass overwrite=True")
    damaged = catalog.must_be_kept(name)
    hold = take_over(store, create_parents=True)
    try:
        mover = renaming(store)
        if damaged and mover is not None:
            mover.set_aside(name)
        return hold, store.begin(step, uuid.uuid4().hex, name=name)
    except BaseException:
        hold.release()
        raise


def publish(
    directory: PendingDirectory,
    draft: Manifest,
    *,
    components_json: bytes | None = None,
    known: dict[str, Any] | None = None,
    replace: bool,
    before: Callable[[], None],
    read_back: Callable[[PendingDirectory], None] | None = None,
) -> Manifest:
    """Write the manifest and give the attempt its name; return the manifest, which is durable then. Blocks on the
    storage.

    ``draft``: lists every file, all of them written and durable. ``components_json``: see ``manifest.json.encode``.
    ``known``: see ``manifest.readable.check_readable``, which raises ``SaveFailed`` for what no reader would take.
    ``before``: called last before the checkpoint becomes visible; what it raises prevents that. ``read_back``: gets the
    attempt once everything is written, and raises where it is not what it should be."""
    directory.sync_directory()
    data = manifests.encode(draft, components_json=components_json)
    check_readable(draft, data, components_json, known if known is not None else {})
    directory.write_small({manifests.FILE_NAME: data})
    directory.sync_directory()
    if read_back is not None:
        read_back(directory)
    before()
    directory.publish(draft.name, replace=replace)
    return replaced(draft, size_bytes=len(data), file_digest=manifests.file_digest(data))


def publish_as_it_is(
    directory: PendingDirectory, manifest: Manifest, data: bytes, *, before: Callable[[], None]
) -> None:
    """Publish a copy of a checkpoint, whose files are all written and durable, under its own name, with the bytes of
    its own manifest, ``data``. Blocks on the storage. ``before``: see ``publish``."""
    directory.sync_directory()
    directory.write_small({manifests.FILE_NAME: data})
    directory.sync_directory()
    before()
    directory.publish(manifest.name, replace=False)


def verify_attempt(directory: PendingDirectory) -> None:
    """Verify every byte of an attempt as it lies on the storage. Raises ``OSError`` where it is not what was written.
    Blocks."""
    reader = directory.open()
    try:
        damage = verify(reader)
    finally:
        reader.close()
    if damage:
        raise OSError(f"read back differs from what was written: {damage[0]}")
