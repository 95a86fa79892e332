"""Tells what is left of a checkpoint, which is damage, from what other tools keep in the same directory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from asyncckpt.catalog import newest
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.names import form_of, step_in
from asyncckpt.manifest.json import FILE_NAME, STATE_FILE
from asyncckpt.protocols import FileInfo, Store

_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.")
#: Checkpoints whose names have one of these forms are ours, whatever names the run uses now.
_DEFAULT_FORMS: Final = frozenset({"step-#", "weights-step-#"})


def looks_ours(files: Mapping[str, FileInfo]) -> bool:
    """Return whether a directory is or was a checkpoint: it has a manifest, or shards, or ``state.json``."""
    return FILE_NAME in files or _has_state(files) or _has_shards(files)


def without_others(store: Store, found: Mapping[str, CheckpointInfo]) -> dict[str, CheckpointInfo]:
    """Leave out what another tool keeps: it has shards of a common form, or a ``state.json``, and no manifest, under a
    name that this run gives to nothing. Blocks on the storage."""
    forms = _forms(found)
    if not forms:
        return dict(found)
    forms |= _DEFAULT_FORMS
    return {
        name: entry
        for name, entry in found.items()
        if entry.attempt or entry.misnamed or form_of(name) in forms or not _is_of_others(store.listing(name))
    }


def emptied(store: Store, path: str, found: Mapping[str, CheckpointInfo], others: set[str]) -> list[CheckpointInfo]:
    """Return, as damaged, the checkpoints of which nothing but a directory is left. A run publishes no such directory,
    so something has deleted what was in it.

    ``found``: the run's checkpoints. ``others``: the names of directories that are none. Where nothing else shows that
    the run has names of this form, an empty directory is somebody's, and no checkpoint."""
    likely = [name for name in others if step_in(name) >= 0]
    if not likely:
        return []
    forms = _forms(found)
    if hinted := newest.hint(store):
        forms.add(form_of(hinted))
    rows: list[CheckpointInfo] = []
    for name in likely:
        if form_of(name) in forms and not any(info.kind != "folder" for info in store.listing(name).values()):
            inode = store.identity(name)
            if inode is not None:
                problem = "the directory is empty: its manifest and its files are missing"
                row = CheckpointInfo(step=step_in(name), name=name, path=os.path.join(path, name), damage=problem)
                rows.append(replace(row, inode=inode))
    return rows


def _forms(found: Mapping[str, CheckpointInfo]) -> set[str]:
    return {form_of(entry.name) for entry in found.values() if entry.attempt and not entry.renamed}


def _is_of_others(files: Mapping[str, FileInfo]) -> bool:
    return FILE_NAME not in files and not (_has_state(files) and _has_shards(files))


def _has_state(files: Mapping[str, FileInfo]) -> bool:
    return STATE_FILE in files and files[STATE_FILE].kind == "file"


def _has_shards(files: Mapping[str, FileInfo]) -> bool:
    return any(info.kind == "file" and _SHARD.search(file) is not None for file, info in files.items())
