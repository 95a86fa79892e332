"""The catalog: the checkpoints of one run directory, found by looking, never by a list somebody kept.

``latest`` and directory names are hints; what counts is a directory whose manifest holds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from asyncckpt.catalog.retention import age
from asyncckpt.errors import AsyncCkptError, CheckpointDamaged, CheckpointNotFound, RunPathError, StepExists
from asyncckpt.manifest import json as manifests
from asyncckpt.protocols import FileInfo, Store, renaming
from asyncckpt.read.damage import check_files

log = logging.getLogger("asyncckpt")

PINS = ".pins"
#: The text file that names the newest full checkpoint: a hint, never truth.
LATEST = "latest"
#: How often a listing is repeated while another process publishes and deletes.
_LOOKS = 20
_STEP_IN_NAME = re.compile(r"step[-_=]?(\d+)|(\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """One checkpoint as ``ls`` sees it. ``damage`` says why it cannot be used, or is None: manifest, names and sizes
    are right (``verify`` reads the bytes). ``nbytes`` is its size on disk. ``kind`` is ``full`` or ``weights``.

    ``sequence`` rises from save to save of a run: the largest was acknowledged last, whatever its step. ``attempt`` is
    the save's uuid. ``renamed``: somebody has given the directory another name than its manifest has, or copied it. It
    is theirs: listed and readable, never deleted, and neither resumed from nor counted by retention. ``misnamed``: the
    name is one that the run would give to another step. That is damage: it may be a copy, or a fault of the storage."""

    step: int
    name: str
    path: str
    kind: str = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)
    nbytes: int = 0
    created_unix_seconds: float = 0.0
    pinned: bool = False
    damage: str | None = None
    sequence: int = 0
    attempt: str = ""
    renamed: bool = False
    misnamed: bool = False


class Catalog:
    """Reads a run directory. Remembers what it has read by name: published checkpoints do not change. Thread-safe
    where one thread refreshes at a time."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self.path = path
        self._known: dict[str, CheckpointInfo] = {}

    def entries(self, *, fresh: bool = True) -> list[CheckpointInfo]:
        """All checkpoints, damaged and renamed ones included, the oldest save first. ``fresh=False`` re-reads only new
        names, and what looked damaged: one error of reading, of a moment ago, must not keep retention from it for
        ever."""
        known = {name: entry for name, entry in self._known.items() if entry.damage is None}
        for _ in range(_LOOKS):
            names = set(self._store.names())
            known = {} if fresh else {name: entry for name, entry in known.items() if name in names}
            looked = {name: self.look(name) for name in names - set(known)}
            known.update((name, entry) for name, entry in looked.items() if entry is not None)
            # what vanished under our eyes was deleted because something newer is there: look for that too
            vanished = any(entry is None and self._store.identity(name) is None for name, entry in looked.items())
            hinted = not known and self._store.identity(LATEST) is not None
            if not vanished and not hinted:
                break
        self._known = known
        pins = self.pins()
        found = [replace(entry, pinned=entry.name in pins) for entry in known.values()]
        return _oldest_first(found)

    def find(self, step: int, kind: str | None = None) -> CheckpointInfo:
        """The checkpoint of that step, the full one where there are two kinds, and the run's own where somebody has
        copied it. Raises ``CheckpointNotFound``, naming the steps there are."""

        def choice(entry: CheckpointInfo) -> tuple[bool, bool, bool, int]:
            return entry.renamed, entry.damage is not None, entry.kind != "full", -entry.sequence

        near = [self.look(name) for name in self._store.names() if _step_in(name) == step]
        here = [entry for entry in near if entry is not None and entry.step == step and kind in (None, entry.kind)]
        good = [entry for entry in here if entry.damage is None and not entry.renamed]
        if good:  # the manifests of all others may be long
            found = min(good, key=choice)
            return replace(found, pinned=found.name in self.pins())
        entries = self.entries()
        matches = [entry for entry in entries if entry.step == step and kind in (None, entry.kind)]
        if not matches:
            have = ", ".join(str(entry.step) for entry in entries[-10:]) or "none"
            raise CheckpointNotFound(f"{self.path}: no checkpoint of step {step}; the newest steps there: {have}")
        return min(matches, key=choice)

    def newest(self, kind: str | None = "full") -> CheckpointInfo:
        """The checkpoint of the run's own that was saved last and looks whole. Raises ``CheckpointNotFound``."""
        own = [entry for entry in self.entries() if not entry.renamed]
        usable = [entry for entry in own if entry.damage is None and kind in (None, entry.kind)]
        if not usable:
            raise CheckpointNotFound(f"{self.path}: no checkpoint here")
        return usable[-1]

    def forget(self, name: str) -> None:
        """Read this one anew next time."""
        self._known.pop(name, None)

    def must_be_kept(self, name: str) -> bool:
        """Whether what bears a name that is to be overwritten is a damaged checkpoint, which is evidence and is set
        aside. Raises ``StepExists`` where it is not this run's."""
        if self._store.identity(name) is None:
            return False
        if name in self._store.names():
            entry = self.look(name)
            if not self._store.listing(name):
                return False
            if entry is not None and not entry.renamed:
                return entry.damage is not None
        raise StepExists(
            f"{os.path.join(self.path, name)} is no checkpoint of this run; it was left as it is. Move it elsewhere, "
            f"or save another step"
        )

    def settle_replaced(self) -> None:
        """Finish what a run that is gone had begun: a checkpoint that had made way for a later save of its step goes
        where that save was published, and gets its name back where it was not. For whoever holds the run's lease, after
        ``Store.reclaim``."""
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
        """Names of pinned checkpoints."""
        return set(self._store.listing(PINS))

    def pin(self, step: int, *, pinned: bool = True) -> CheckpointInfo:
        """Protect a checkpoint from retention (or stop doing so). Atomic; safe while another process prunes. Raises
        ``RunPathError`` where the pins lead out of the run directory."""
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

    def look(self, name: str) -> CheckpointInfo | None:
        """What is there under this name, None where nothing is. Damage only counts in a directory that stayed: one
        that is deleted or replaced while it is read looks damaged, and is not."""
        entry: CheckpointInfo | None = None
        for _ in range(_LOOKS):
            before = self._store.identity(name)
            entry = self._look_once(name)
            if entry is None or entry.damage is None:
                return entry
            after = self._store.identity(name)
            if after is None:
                return None
            if after == before:
                break
        return entry

    def _look_once(self, name: str) -> CheckpointInfo | None:
        path = os.path.join(self.path, name)
        step = _step_in(name)
        try:
            reader = self._store.open(name)
        except CheckpointNotFound:
            return None  # deleted meanwhile
        except (CheckpointDamaged, OSError) as error:
            return CheckpointInfo(step=step, name=name, path=path, damage=str(error)) if step >= 0 else None
        try:
            listing = self._store.listing(name)
            if manifests.FILE_NAME not in listing and not _looks_ours(listing):
                return None
            manifest = manifests.load(reader)
            renamed = name != manifest.name
            if renamed and step != manifest.step and _digits_aside(name) == _digits_aside(manifest.name):
                problem = f"its manifest is that of {manifest.name}; a copy wants a name that says no other step"
                return CheckpointInfo(step=step, name=name, path=path, damage=problem, misnamed=True)
            damage = check_files(reader, manifest)
            return CheckpointInfo(
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
                renamed=renamed,
            )
        except (AsyncCkptError, OSError) as error:
            return CheckpointInfo(step=step, name=name, path=path, damage=str(error))
        finally:
            reader.close()


def _oldest_first(entries: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """In the order they were saved in. Where a manifest cannot be read nobody knows when that was: such a one comes
    after the newest of the steps up to its own."""
    known = [entry for entry in entries if entry.attempt and not entry.renamed]

    def key(entry: CheckpointInfo) -> tuple[int, int, str, str]:
        sequence, step = age(entry)
        if not entry.attempt:
            sequence = max((one.sequence for one in known if one.step <= step), default=0)
        return sequence, step, entry.kind, entry.name

    return sorted(entries, key=key)


def _looks_ours(listing: Mapping[str, FileInfo]) -> bool:
    """A directory without a manifest that holds shards or ``state.json`` was a checkpoint once."""
    return any(
        info.kind == "file" and (name == manifests.STATE_FILE or re.search(r"-\d{5}-of-\d{5}\.", name) is not None)
        for name, info in listing.items()
    )


def _digits_aside(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _step_in(name: str) -> int:
    """The step that a directory's name says, -1 where it says none."""
    match = _STEP_IN_NAME.search(name)
    return int(match.group(1) or match.group(2)) if match else -1
