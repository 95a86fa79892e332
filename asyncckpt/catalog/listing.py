"""A listing holds what one look at a run directory found, with the checkpoint that is wanted most still open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from asyncckpt.catalog.retention import age
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, RanksDisagree
from asyncckpt.protocols import Store
from asyncckpt.read.opening import OpenCheckpoint, open_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """Describes one checkpoint, as ``ls`` lists it.

    ``damage``: why it cannot be used; None where manifest, names and sizes are right (``verify`` reads the bytes, too).
    ``nbytes``: its size on disk. ``kind``: ``full`` or ``weights``. ``sequence`` rises from save to save of a run: the
    largest was acknowledged last, whatever its step is. ``attempt``: the save's uuid. ``renamed``: somebody has copied
    the directory, or given it another name than its manifest has. It is theirs: it is listed and can be read, but is
    never deleted, and neither resumed from nor counted by retention. ``misnamed``: the directory has a name that the
    run would give to another step. That is damage: it may be a copy, or a fault of the storage. ``extra``: the names of
    files in the directory that the manifest does not list; they are never read. ``parent``: the ``attempt`` of the
    checkpoint that training came from, empty where it began anew or nobody knows. ``names``: those that the save was
    given; each means the last saved of the checkpoints that have it. ``abandoned``: training went back and
    left this checkpoint: the newest one certainly does not descend from it. ``inode``: what ``Store.identity`` said of
    the directory when it was looked at. ``annotated``: what ``Run.annotate`` has given it; ``metrics`` has these, too,
    and of two of one name the one that was annotated. ``annotation_problem``: why its annotations cannot be read;
    retention keeps it then. ``derived``: what made it of other checkpoints (``average``, ``thin``); empty where it
    was saved."""

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
    extra: tuple[str, ...] = ()
    parent: str = ""
    abandoned: bool = False
    inode: int | None = None
    annotated: Mapping[str, float] = field(default_factory=dict)
    annotation_problem: str | None = None
    names: tuple[str, ...] = ()
    derived: str = ""

    @property
    def beside(self) -> bool:
        """Whether it stands beside the line of training: somebody has made it of several checkpoints, so it is none
        that training went on from, and retention leaves it alone."""
        return self.derived not in ("", "thin")


#: Says how much a usable checkpoint is wanted: of several, the one with the largest answer; None: not at all.
Preference = Callable[[CheckpointInfo], tuple[int | str, ...] | None]


def newest_of(kind: str | None) -> Preference:
    """Prefer the checkpoint of the run's own that was saved last. ``kind``: full or weights; None: a full one, where
    there is one. It is the one that ``newest.newest`` finds, unless that is damaged."""

    def preference(entry: CheckpointInfo) -> tuple[int | str, ...] | None:
        wanted = not entry.renamed and kind in (None, entry.kind)
        return (entry.kind == "full", *age(entry), entry.kind, entry.name) if wanted else None

    return preference


def of_step(step: int | str, kind: str | None = None) -> Preference:
    """Prefer the checkpoint that ``Catalog.find`` chooses. ``step``: a step or a name."""

    def preference(entry: CheckpointInfo) -> tuple[int | str, ...] | None:
        if isinstance(step, str):
            return (entry.sequence,) if step in entry.names and not entry.renamed else None
        wanted = entry.step == step and kind in (None, entry.kind)
        return (not entry.renamed, entry.kind == "full", entry.sequence) if wanted else None

    return preference


def of_name(name: str, entries: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """Return the checkpoint of the run's own that a name means: the last saved of those that have it, damaged or not;
    the one whose directory has that name where there is none; None where nothing has it."""
    own = [entry for entry in entries if not entry.renamed]
    named = [entry for entry in own if name in entry.names]
    if named:
        return max(named, key=lambda entry: entry.sequence)
    return next((entry for entry in own if entry.name == name), None)


class Listing:
    """Holds the checkpoints that one look at a run found, and keeps the usable one that is wanted most open.

    It stays open from the moment it is found until it is read, so retention spares it, and nothing of it is parsed or
    checked again. ``entries``: the oldest save first. ``prefer``: which one stays open; None: none does. ``whole``:
    whether all of each manifest is parsed, or, of any other than the one that is opened, only what an entry says. Close
    the listing, or use it in a ``with``. For one thread.
    """

    def __init__(self, store: Store, prefer: Preference | None = None, *, whole: bool = True) -> None:
        self.entries: list[CheckpointInfo] = []
        self._seen_by = ""
        self.whole = whole
        self._store = store
        self._prefer = prefer
        self._kept: tuple[CheckpointInfo, OpenCheckpoint] | None = None

    @classmethod
    def seen_by(cls, who: str, store: Store, entries: list[CheckpointInfo]) -> Self:
        """Make a listing of what ``who`` has found, which may be too much for thousands of others to look at again.
        What it opens is only parsed; ``open`` raises ``CheckpointDamaged`` where it is not there, and
        ``RanksDisagree`` where another is."""
        listing = cls(store)
        listing.entries, listing._seen_by = entries, who
        return listing

    def keep(self, entry: CheckpointInfo, opened: OpenCheckpoint) -> bool:
        """Take over a usable checkpoint if it is wanted more than the one that is kept so far, which is closed then.
        False where it is not: the caller closes it."""
        preference = self._prefer(entry) if self._prefer is not None else None
        if preference is None or self._prefer is None:
            return False
        if self._kept is not None:
            kept = self._kept[0]
            if kept.name != entry.name and (self._prefer(kept) or ()) >= preference:
                return False
            self.close()
        self._kept = entry, opened
        return True

    def open(self, entry: CheckpointInfo) -> OpenCheckpoint:
        """Hand over a checkpoint of the listing: the caller closes it. One that was not kept open is opened now, which
        blocks and raises ``CheckpointNotFound`` where it has been deleted, ``CheckpointDamaged`` and
        ``VersionUnsupported``."""
        if self._kept is not None and (self._kept[0].name, self._kept[0].attempt) == (entry.name, entry.attempt):
            opened, self._kept = self._kept[1], None
            try:
                opened.read_components()
            except BaseException:
                opened.close()
                raise
            return opened
        if not self._seen_by:
            return open_checkpoint(self._store.open(entry.name))
        try:
            opened = open_checkpoint(self._store.open(entry.name), compare_files=False)
        except CheckpointNotFound as error:
            raise CheckpointDamaged(f"{entry.path}: {self._seen_by} sees it, and this rank does not") from error
        if entry.attempt and opened.manifest.attempt != entry.attempt:  # it was replaced, or an old listing is cached
            opened.close()
            raise RanksDisagree(
                f"{entry.path}: {self._seen_by} sees another checkpoint under this name than this rank. Nothing was "
                f"restored: call wait() on all ranks first, or restore once saving has ended"
            )
        return opened

    def close(self) -> None:
        """Close the checkpoint that was kept open, unless it has been handed over. Idempotent."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
