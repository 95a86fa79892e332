"""The thinner makes a weights-only checkpoint of a full one: it links the modules' files, and leaves the rest out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import count

from asyncckpt import jsontree
from asyncckpt.catalog.names import another
from asyncckpt.codecs import digests
from asyncckpt.commit.file_copy import link_files
from asyncckpt.commit.publication import publish
from asyncckpt.errors import UnsupportedValue
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.json import STATE_FILE
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.manifest.table import files_with_tensors
from asyncckpt.plan.layout import fingerprint
from asyncckpt.protocols import Store
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.types import TensorSpec

#: How the manifest names it in ``derived``.
THIN = "thin"


@dataclass(frozen=True, slots=True)
class Thinned:
    """Tells what became of a checkpoint: the ``name`` of the weights-only one that is left of it, how many bytes of
    files that one has (``nbytes``), and how many are not in it any more (``freed_bytes``)."""

    step: int
    source: str
    name: str
    nbytes: int
    freed_bytes: int


def files_that_stay(manifest: Manifest, path: str) -> tuple[FileRecord, ...]:
    """Return the files that the modules of a checkpoint need, without ``state.json``, which is written anew. Pure.
    ``path``: the checkpoint's, for messages. Raises ``UnsupportedValue`` where it has no module, or a file holds
    tensors of a module beside others."""
    kept = {name for name, record in manifest.components.items() if record.kind == "module"}
    if not kept:
        raise UnsupportedValue(
            f"{path} has no module (components: {', '.join(manifest.components)}), so nothing would be left of it. "
            f"Keep it whole, or delete it"
        )
    of_kept: set[str] = set()
    of_others: set[str] = set()
    for name, component in manifest.components.items():
        (of_kept if name in kept else of_others).update(files_with_tensors(component))
    if of_kept & of_others:
        raise UnsupportedValue(
            f"{path}/{min(of_kept & of_others)} holds tensors of a module beside those of other components, so none of "
            f"them can be dropped without writing the others anew. Keep it whole, or delete it"
        )
    by_name = {record.name: record for record in manifest.files}
    bases = {name: set(record.bases) for name, record in by_name.items()}
    needed = of_kept.union(*(bases[name] for name in of_kept))
    all_bases = set().union(*bases.values())
    dropped = {name for name in manifest.components if name not in kept}
    parts = manifest.parts.names() if manifest.parts is not None else ()  # what is left has one manifest

    def stays(record: FileRecord) -> bool:
        if record.name in needed or record.name in manifest.assets:
            return True
        if record.name in parts or record.name in of_others or record.name in all_bases or record.name == STATE_FILE:
            return False
        return record.name.partition("/")[0] not in dropped or "/" not in record.name

    return tuple(record for record in manifest.files if stays(record))


def thin(store: Store, checkpoint: OpenCheckpoint, taken: Collection[str], check: Callable[[], None]) -> Thinned:
    """Publish, beside a full checkpoint, what is left of it without all that is no module; the full one stays. Whoever
    calls this holds the run, and closes the checkpoint. ``taken``: names that are in use. ``check``: see
    ``publication.publish``. Blocks on the storage, for links alone where it has them. Raises ``UnsupportedValue``,
    ``CheckpointDamaged`` and ``OSError``."""
    manifest = checkpoint.manifest
    records = files_that_stay(manifest, checkpoint.path)
    components = {name: record for name, record in manifest.components.items() if record.kind == "module"}
    state = jsontree.dumps({name: tree for name, tree in checkpoint.trees.items() if name in components})
    base = f"weights-{manifest.name}"
    name = next(free for number in count(1) if (free := another(base, number)) not in taken)
    digest = digests.get(manifest.digest)
    shown = tuple(
        (
            name,
            tuple(TensorSpec(fqn, tensor.dtype, tensor.shape, tensor.nbytes) for fqn, tensor in record.tensors.items()),
        )
        for name, record in components.items()
    )
    draft = replace(
        manifest,
        name=name,
        kind="weights",
        files=(*records, manifests.whole_file(STATE_FILE, state, digest)),
        components=components,
        parts=None,
        layout=fingerprint(shown),
        derived={
            "by": THIN,
            "from": [{"attempt": manifest.attempt, "step": manifest.step, "name": manifest.name}],
            "dropped": [name for name in manifest.components if name not in components],
        },
        least_version=manifests.version_of_values(state, manifest.config),
    )
    directory = store.begin(manifest.step, uuid.uuid4().hex, name=name)
    try:
        link_files(directory, checkpoint.reader, manifest, records)
        directory.write_small({STATE_FILE: state})
        made = publish(directory, draft, replace=False, before=check)
    except BaseException:
        directory.discard()
        raise
    return Thinned(manifest.step, manifest.name, name, made.nbytes, manifest.nbytes - made.nbytes)
