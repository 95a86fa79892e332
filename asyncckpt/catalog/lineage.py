"""Which checkpoint training came from: a process keeps count of it, and a listing shows which ones were left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Recorded(Protocol):
    """Says what a checkpoint's manifest records of where it comes from; see ``CheckpointInfo``."""

    @property
    def name(self) -> str: ...

    @property
    def step(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def sequence(self) -> int: ...

    @property
    def attempt(self) -> str: ...

    @property
    def parent(self) -> str: ...

    @property
    def damage(self) -> str | None: ...

    @property
    def renamed(self) -> bool: ...


def abandoned(entries: Iterable[Recorded]) -> set[str]:
    """Return the names of the checkpoints that the newest one certainly does not descend from: training went back to an
    earlier one and left them. Pure.

    It follows the parents from the newest checkpoint on. Where one of them has been deleted, nobody can tell about the
    checkpoints before it, except that those of a later step than the line had reached were left."""
    known = sorted(
        (e for e in entries if e.attempt and not e.renamed and not getattr(e, "beside", False)),
        key=lambda e: (e.sequence, e.step),
        reverse=True,
    )
    head = next((entry for entry in known if entry.damage is None), None)
    if head is None:
        return set()
    there = {entry.attempt: entry.sequence for entry in known}
    left: set[str] = set()
    on_line, expected = head, head.parent
    for entry in known:
        if entry.sequence >= head.sequence:
            continue
        if expected and entry.attempt == expected:
            on_line, expected = entry, entry.parent
        elif there.get(expected, entry.sequence) < entry.sequence or _is_past(entry, on_line):
            left.add(entry.name)
    return left


def _is_past(earlier: Recorded, later: Recorded) -> bool:
    """Return whether a checkpoint has a step that training reached again after it, in ``later``: steps only rise along
    a line, but a full checkpoint and a weights-only one of it can have the same."""
    return earlier.step > later.step or (earlier.step == later.step and earlier.kind == later.kind)


@dataclass(slots=True, eq=False)
class _Place:
    """A place on the way that training took: a checkpoint, or a save whose ``attempt`` is not known to be durable."""

    attempt: str | None
    before: _Place | None


class Lineage:
    """Keeps count of the checkpoint that each save of this process comes from: the last one that it saved, or the one
    that training was sent to. A save that failed is passed over. Thread-safe; never blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here: _Place | None = None
        self._saves: dict[int, _Place] = {}

    def go_to(self, attempt: str) -> None:
        """Note that training goes on from this checkpoint."""
        with self._lock:
            self._here = _Place(attempt or None, None)

    def begin(self, sequence: int) -> None:
        """Note that a save has begun: what is saved after it comes from it."""
        with self._lock:
            self._here = self._saves[sequence] = _Place(None, self._here)

    def parent_of(self, sequence: int) -> str:
        """Return the attempt of the checkpoint that this save comes from, or "" where there is none. Ask once all saves
        before it have ended."""
        with self._lock:
            save = self._saves.get(sequence)
            place = save.before if save is not None else None
            while place is not None and place.attempt is None:
                place = place.before
            return place.attempt or "" if place is not None else ""

    def end(self, sequence: int, attempt: str | None) -> None:
        """Note that a save is durable as ``attempt``, or, with None, that it has failed. The second call for a save
        does nothing."""
        with self._lock:
            place = self._saves.pop(sequence, None)
            if place is None:
                return
            if attempt is not None:
                place.attempt, place.before = attempt, None
            elif self._here is place:
                self._here = place.before
