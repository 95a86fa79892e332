"""Opens the checkpoint that a caller chose, a step's or the newest, while another process publishes and deletes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.newest import refusal
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, DigestMismatch
from asyncckpt.protocols import Reader, Store
from asyncckpt.read.opening import OpenCheckpoint

#: A checkpoint is looked for anew so many times.
LOOKS = 20
_T = TypeVar("_T")


def open_chosen(store: Store, step: int | str | None) -> tuple[CheckpointInfo, OpenCheckpoint]:
    """Find the checkpoint of that step, or with None the newest, and hand it over open. Blocks on the storage. Raises
    ``CheckpointNotFound``, ``VersionUnsupported`` and ``CheckpointDamaged``, which for the newest is
    ``NewestDamaged``."""
    for looks_left in reversed(range(LOOKS)):
        with Catalog(store, store.address).find_open(step) as listing:
            entry = listing.entries[0]
            try:
                return entry, listing.open(of_its_name(entry))
            except CheckpointNotFound:  # retention took it meanwhile, because a newer one is there
                if not looks_left:
                    raise
            except CheckpointDamaged as error:
                if looks_left and is_gone(store, entry):
                    continue
                raise (damaged_newest(store, entry, error) if step is None else error) from error
    raise AssertionError("unreachable")


def open_unseen(store: Store, step: int | str | None) -> tuple[CheckpointInfo, Reader]:
    """Find the checkpoint as ``open_chosen`` does, and open it without looking at anything in it, for whoever says what
    is wrong with it."""
    catalog = Catalog(store, store.address)
    for looks_left in reversed(range(LOOKS)):
        entry = catalog.newest() if step is None else catalog.find(step)
        try:
            return entry, store.open(entry.name)
        except CheckpointNotFound:
            if not looks_left:
                raise
    raise AssertionError("unreachable")


def read_chosen(store: Store, step: int | str | None, read: Callable[[OpenCheckpoint], _T]) -> _T:
    """Open the checkpoint as ``open_chosen`` does, and return what ``read`` does; anew where it is deleted or replaced
    meanwhile. Raises as that does, and what ``read`` raises."""
    for looks_left in reversed(range(LOOKS)):
        entry, opened = open_chosen(store, step)
        with opened as checkpoint:
            try:
                return read(checkpoint)
            except CheckpointDamaged as error:
                # where the file system has no locks, it may be deleted or replaced while it is read
                if looks_left and is_gone(store, entry):
                    continue
                if step is None and not isinstance(error, DigestMismatch):
                    raise damaged_newest(store, entry, error) from error
                raise
    raise AssertionError("unreachable")


def is_gone(store: Store, entry: CheckpointInfo) -> bool:
    """Return whether this very directory is not there any more: another one may have its name by now."""
    there = store.identity(entry.name)
    return there is None or (entry.inode is not None and there != entry.inode)


def damaged_newest(store: Store, entry: CheckpointInfo, error: CheckpointDamaged) -> CheckpointDamaged:
    """Make the error that refuses the newest checkpoint, from what is wrong with it."""
    return refusal(Catalog(store, store.address).entries(), entry, error)


def of_its_name(entry: CheckpointInfo) -> CheckpointInfo:
    """Return the entry. Raises ``CheckpointDamaged`` where it holds another step than its name says."""
    if entry.misnamed:
        raise CheckpointDamaged(f"{entry.path}: {entry.damage}")
    return entry
