"""The catalog finds the checkpoints of one run directory by looking, never in a list that somebody kept.

The file ``latest`` and the directories' names are hints. What counts is a directory with a manifest that holds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from asyncckpt.catalog import newest, remains
from asyncckpt.catalog.annotations import ANNOTATIONS, Annotation, Annotations, check_names, is_attempt
from asyncckpt.catalog.lineage import abandoned
from asyncckpt.catalog.listing import CheckpointInfo, Listing, Preference, newest_of, of_name, of_step
from asyncckpt.catalog.misplaced import refuse_checkpoint
from asyncckpt.catalog.names import form_of, step_in
from asyncckpt.catalog.retention import age
from asyncckpt.catalog.steps import numbers
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointDamaged,
    CheckpointNotFound,
    ManifestInvalid,
    RunPathError,
    StepExists,
)
from asyncckpt.manifest import json as manifests
from asyncckpt.protocols import Store, renaming
from asyncckpt.read.damage import check_files
from asyncckpt.read.opening import OpenCheckpoint

log = logging.getLogger("asyncckpt")

PINS = ".pins"
#: A listing is repeated so often while another process publishes and deletes.
_LIST_RETRIES = 20


class Catalog:
    """Reads a run directory. It remembers by name what it has read, as published checkpoints do not change. Thread-safe
    as long as only one thread calls ``entries`` at a time. Every method blocks on the disk."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self.path = path
        self.annotations = Annotations(store)
        #: The attempts of which was said that their annotations cannot be read.
        self._told: set[str] = set()
        self._known: dict[str, CheckpointInfo] = {}
        self._trusted = ""

    def entries(self, *, fresh: bool = True, listing: Listing | None = None) -> list[CheckpointInfo]:
        """List all checkpoints, damaged and renamed ones included, the oldest save first. With ``fresh=False`` only new
        names are read, and those that looked damaged: a read error of a moment ago must not keep retention from a
        checkpoint for ever. ``listing`` keeps the one open that it prefers. Raises ``RunPathError`` where the directory
        is a checkpoint itself."""
        known = {name: entry for name, entry in self._known.items() if entry.damage is None}
        for _ in range(_LIST_RETRIES):
            names = set(self._store.names())
            known = {} if fresh else {name: entry for name, entry in known.items() if name in names}
            inspected = {name: self.inspect(name, listing) for name in names - set(known)}
            known.update((name, entry) for name, entry in inspected.items() if entry is not None)
            # one that vanished meanwhile was deleted because something newer is there: that has to be found, too
            vanished = any(entry is None and self._store.identity(name) is None for name, entry in inspected.items())
            hinted = not known and self._store.identity(newest.LATEST) is not None
            if not vanished and not hinted:
                break
        self._known = known = remains.without_others(self._store, known)
        rows = [*known.values(), *remains.emptied(self._store, self.path, known, names - set(known))]
        if not rows:
            refuse_checkpoint(self._store)
        left = abandoned(rows)
        found = _oldest_first([replace(row, abandoned=row.name in left) for row in self._with_marks(rows)])
        unreadable = {row.name for row in found if not row.attempt and not row.renamed}
        saved_last = newest.hint(self._store) if unreadable else ""
        # nobody can tell from its manifest, but where the run noted it, that it was saved last
        return sorted(found, key=lambda row: row.name in unreadable and row.name == saved_last)

    def _with_marks(self, rows: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
        """Add what lies beside the checkpoints: which are pinned, and the metrics that they were given later."""
        pins, annotations = self.pins(), self.annotations.all()
        found: list[CheckpointInfo] = []
        for row in rows:
            given = annotations.get(row.attempt, Annotation())
            if given.problem is not None and row.attempt not in self._told:
                self._told.add(row.attempt)
                log.warning("%s: its annotations cannot be read, so it is kept: %s", row.path, given.problem)
            marked = replace(row, pinned=row.name in pins, annotation_problem=given.problem)
            found.append(replace(marked, metrics={**row.metrics, **given.metrics}, annotated=dict(given.metrics)))
        return found

    def marks(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the pins and the annotations' objects that there are now. While this stays the same, what ``entries``
        said of them holds."""
        return frozenset(self.pins()), frozenset(self.annotations.keys().values())

    def listing(self, prefer: Preference | None = None) -> Listing:
        """List all checkpoints as ``entries`` does, and keep the one open that is preferred. What a manifest says of
        its tensors is looked at only where the checkpoint is opened, which raises ``ManifestInvalid`` for what nobody
        but a forger writes: what lies there unharmed has its digest."""
        listing = Listing(self._store, prefer, whole=False)
        try:
            listing.entries = self.entries(listing=listing)
        except BaseException:
            listing.close()
            raise
        return listing

    def find_open(self, step: int | str | None, kind: str | None = None) -> Listing:
        """Find the checkpoint of a step as ``find`` does, or the newest as ``newest`` does, and keep it open: it is the
        only entry of the listing. Raises ``CheckpointNotFound``."""
        listing = Listing(self._store, newest_of(kind) if step is None else of_step(step, kind))
        try:
            listing.entries = [self.newest(kind, listing) if step is None else self.find(step, kind, listing)]
        except BaseException:
            listing.close()
            raise
        return listing

    def find(self, step: int | str, kind: str | None = None, listing: Listing | None = None) -> CheckpointInfo:
        """Find the checkpoint of that step: the full one where there are two kinds, the last saved one where there are
        several, and the run's own where somebody has copied it. A name finds the checkpoint that it means. ``listing``
        keeps the one open that it prefers. Raises ``CheckpointNotFound``, naming the steps there are."""
        if isinstance(step, str):
            return self._find_name(step, listing)

        def choice(entry: CheckpointInfo) -> tuple[bool, bool, bool, int]:
            return entry.renamed, entry.damage is not None, entry.kind != "full", -entry.sequence

        near = [self.inspect(name, listing) for name in self._store.names() if step_in(name) == step]
        here = [entry for entry in near if entry is not None and entry.step == step and kind in (None, entry.kind)]
        good = [entry for entry in here if entry.damage is None and not entry.renamed]
        if good:  # then the manifests of all others, which may be long, need not be read
            return self._with_marks([min(good, key=choice)])[0]
        entries = self.entries(listing=listing)
        matches = [entry for entry in entries if entry.step == step and kind in (None, entry.kind)]
        if not matches:
            have = ", ".join(str(entry.step) for entry in entries[-10:]) or "none"
            raise CheckpointNotFound(f"{self.path}: no checkpoint of step {step}; the newest steps there: {have}")
        return min(matches, key=choice)

    def _find_name(self, name: str, listing: Listing | None) -> CheckpointInfo:
        entries = self.entries(listing=listing)
        found = of_name(name, entries)
        if found is None:
            have = ", ".join(sorted({name for entry in entries for name in entry.names})[:20]) or "none"
            raise CheckpointNotFound(f"{self.path}: no checkpoint has the name {name!r}; the names there: {have}")
        unread = [entry.name for entry in entries if not entry.attempt]
        if unread and name in found.names:
            log.warning(
                "%s: %r is taken for %s; %s cannot be read, and may have that name", self.path, name, found.name, unread
            )
        return found

    def newest(self, kind: str | None = None, listing: Listing | None = None) -> CheckpointInfo:
        """Find the checkpoint that ``newest.newest`` names, damaged or not. ``listing`` keeps the one open that it
        prefers. Raises ``CheckpointNotFound``."""
        entries = self.entries(listing=listing)
        found = newest.newest(entries, kind)
        if found is None:
            others = ", ".join(entry.name for entry in entries[-10:])
            why = (
                f" of the kind {kind}" if kind is not None else " of its own: they are copies, or renamed; give a step"
            )
            listed = f"{why} (there: {others})" if entries else ""
            raise CheckpointNotFound(f"{self.path}: no checkpoint here{listed}")
        newest.tell_of_missing(self._store, self.path, found)
        return found

    def forget(self, name: str) -> None:
        """Read the checkpoint of this name anew next time."""
        self._known.pop(name, None)

    def next_sequence(self) -> int:
        """Return the sequence number of a checkpoint that is published now. Blocks on the storage."""
        return 1 + max((entry.sequence for entry in self.entries(fresh=False)), default=0)

    def must_be_kept(self, name: str) -> bool:
        """Whether the directory that a save is to overwrite is a damaged checkpoint: that is evidence, and is set
        aside. Raises ``StepExists`` where it is no checkpoint of this run."""
        if self._store.identity(name) is None:
            return False
        if name in self._store.names():
            entry = self.inspect(name)
            if not self._store.listing(name):
                return False  # an empty directory is no checkpoint: publishing takes its place
            if entry is not None and not entry.renamed:
                return entry.damage is not None
        raise StepExists(
            f"{os.path.join(self.path, name)} is no checkpoint of this run; it was left as it is. Move it elsewhere, "
            f"or save another step"
        )

    def settle_replaced(self) -> None:
        """Finish what a run that is gone has begun. A checkpoint had made way for a later save of its step: it is
        deleted if that save was published, and gets its name back if it was not. Only the holder of the run's lease may
        call this, after ``Store.reclaim``."""
        store = renaming(self._store)
        waiting = store.replaced() if store is not None else []
        if store is None or not waiting:
            return
        published = {entry.attempt: entry for entry in self.entries() if not entry.renamed}
        for one in waiting:
            successor = published.get(one.attempt)
            if successor is None:
                store.put_back(one)
            elif successor.damage is None:
                store.remove(one.hidden)
            else:
                log.error("%s is kept, because %s, which was to replace it, is damaged", one.hidden, successor.path)

    def pins(self) -> set[str]:
        """Return the names of pinned checkpoints."""
        return set(self._store.listing(PINS))

    def pin(self, step: int | str, *, pinned: bool = True) -> CheckpointInfo:
        """Protect a checkpoint from retention, or with ``pinned=False`` stop doing so, and return its row. Atomic, and
        safe while another process prunes. Raises ``RunPathError`` where the pins lead out of the run directory."""
        entry = self.find(step)
        key = f"{PINS}/{entry.name}"
        try:
            if pinned:
                with contextlib.suppress(FileExistsError):
                    self._store.put(key, b"")
            else:
                self._store.delete(key)
        except OSError as error:
            where = os.path.join(self.path, PINS)
            raise RunPathError(f"{where}: cannot change the pin of {entry.name} ({error}); repair the path") from error
        return replace(entry, pinned=pinned)

    def annotate(self, step: int | str, metrics: Mapping[str, Any]) -> CheckpointInfo:
        """Give a checkpoint metrics, durably, and return its row. Safe while another process saves and prunes: where
        this returns, the checkpoint was there, and whoever decides later what to delete knows of them. Raises
        ``CheckpointNotFound``, ``CheckpointDamaged``, ``InvalidOption`` and ``RunPathError``."""
        check_names(metrics)
        values = numbers(metrics)
        entry = self.find(step)
        if entry.damage is not None or not is_attempt(entry.attempt):
            raise CheckpointDamaged(
                f"{entry.path}: {entry.damage or 'its manifest names no attempt'}. A checkpoint that cannot be used "
                f"takes no metrics"
            )
        with contextlib.closing(self._store.open(entry.name)):  # retention spares it until they are durable
            try:
                key, given = self.annotations.add(entry.attempt, values)
                stayed = self._store.identity(entry.name) == entry.inode
                if not stayed:
                    self.annotations.withdraw(key)
            except CheckpointDamaged:
                raise
            except OSError as error:
                where = os.path.join(self.path, ANNOTATIONS)
                raise RunPathError(f"{where}: cannot annotate {entry.name} ({error}); repair the path") from error
        if not stayed:
            raise CheckpointNotFound(f"{entry.path} was deleted or saved again meanwhile: it was not annotated")
        return replace(entry, metrics={**entry.metrics, **given}, annotated=given, annotation_problem=None)

    def inspect(self, name: str, listing: Listing | None = None) -> CheckpointInfo | None:
        """Describe the checkpoint of this name; None where there is none. Damage only counts in a directory that
        stayed: one that is deleted or replaced while it is read looks damaged, and is not."""
        entry: CheckpointInfo | None = None
        for _ in range(_LIST_RETRIES):
            before = self._store.identity(name)
            entry = self._inspect_once(name, listing, before)
            if entry is None or entry.damage is None:
                return entry
            after = self._store.identity(name)
            if after is None:
                return None
            if after == before:
                break
        return entry

    def trust(self, file_digest: str) -> None:
        """Take it from whoever has just published a manifest, the digest of whose file this is, that readers take what
        it says of tensors."""
        self._trusted = file_digest

    def _parses_all(self, listing: Listing | None, data: bytes) -> bool:
        if listing is not None and not listing.whole:
            return False
        return not self._trusted or manifests.file_digest(data) != self._trusted

    def _inspect_once(self, name: str, listing: Listing | None, inode: int | None) -> CheckpointInfo | None:
        path = os.path.join(self.path, name)
        step = step_in(name)
        try:
            reader = self._store.open(name)
        except CheckpointNotFound:
            return None  # it was deleted meanwhile
        except (CheckpointDamaged, OSError) as error:
            found = CheckpointInfo(step=step, name=name, path=path, damage=str(error), inode=inode)
            return found if step >= 0 else None
        handed_on = False
        try:
            manifest = manifests.load(reader, whole=functools.partial(self._parses_all, listing))
            renamed = name != manifest.name
            if renamed and step != manifest.step and form_of(name) == form_of(manifest.name):
                problem = f"its manifest is that of {manifest.name}; a copy wants a name that says no other step"
                return CheckpointInfo(step=step, name=name, path=path, damage=problem, misnamed=True, inode=inode)
            damage, extra = check_files(reader, manifest)
            entry = CheckpointInfo(
                step=manifest.step,
                name=name,
                path=path,
                kind=manifest.kind,
                metrics=manifest.metrics,
                nbytes=manifest.nbytes,
                created_unix_seconds=manifest.created_unix_seconds,
                damage=str(damage[0]) if damage else None,
                sequence=manifest.sequence,
                attempt=manifest.attempt,
                parent=manifest.parent,
                names=manifest.names,
                derived=str(manifest.derived.get("by", "")),
                extra=extra,
                inode=inode,
                renamed=renamed,
            )
            if listing is not None and not damage:
                handed_on = listing.keep(entry, OpenCheckpoint(reader, manifest))
            return entry
        except (AsyncCkptError, OSError) as error:
            problem = str(error)
            try:
                if isinstance(error, ManifestInvalid) and not remains.looks_ours(self._store.listing(name)):
                    return None
            except OSError as worse:
                problem = str(worse)
            return CheckpointInfo(step=step, name=name, path=path, damage=problem, inode=inode)
        finally:
            if not handed_on:
                reader.close()


def _oldest_first(entries: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """Sort checkpoints in the order they were saved in. Nobody knows when one was saved whose manifest cannot be read:
    it comes after the newest of the steps up to its own."""
    known = [entry for entry in entries if entry.attempt and not entry.renamed]

    def key(entry: CheckpointInfo) -> tuple[int, int, str, str]:
        sequence, step = age(entry)
        if not entry.attempt:
            sequence = max((one.sequence for one in known if one.step <= step), default=0)
        return sequence, step, entry.kind, entry.name

    return sorted(entries, key=key)
