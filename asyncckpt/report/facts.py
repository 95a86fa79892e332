"""Gathers what a report tells: what lies in the run, which is true, and what its journal says, which is a hint."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.catalog.journal import JournalEntry
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.retention import KeepBest
from asyncckpt.errors import AsyncCkptError, InvalidOption
from asyncckpt.run import Run

#: The manifests of so many checkpoints are opened for what they were made with.
_OPENED = 50


@dataclass(frozen=True, slots=True)
class Point:
    """One checkpoint that was saved, there still or not. ``state``: ``kept``, ``pinned``, ``damaged`` or ``deleted``.
    Times and sizes are None where the journal does not tell them."""

    step: int
    name: str
    kind: str
    state: str
    at_unix_seconds: float | None
    metrics: Mapping[str, float]
    nbytes: int
    written_bytes: float | None = None
    state_bytes: float | None = None
    stall_seconds: float | None = None
    durable_seconds: float | None = None

    @property
    def linked_bytes(self) -> float | None:
        """What was linked and not written again."""
        return max(0.0, self.nbytes - self.written_bytes) if self.written_bytes is not None else None

    @property
    def compressed_bytes(self) -> float | None:
        """How much less the files take than the tensors would."""
        return max(0.0, self.state_bytes - self.nbytes) if self.state_bytes else None

    @property
    def gigabytes_a_second(self) -> float | None:
        """How fast what was written became durable."""
        return self.written_bytes / self.durable_seconds / 1e9 if self.written_bytes and self.durable_seconds else None


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a page tells of one run. ``points``: in the order of their saves. ``best``: for each metric that has a
    known direction, the name of the best checkpoint that is there. ``environments``: ``(time, step, versions)`` of the
    first save and of each with others. ``health``: what went wrong, and what was verified, the newest first."""

    path: str
    entries: Sequence[CheckpointInfo]
    journal: Sequence[JournalEntry]
    points: Sequence[Point]
    best: Mapping[str, str]
    environments: Sequence[tuple[float, int, Mapping[str, str]]] = field(default_factory=tuple)
    health: Sequence[JournalEntry] = field(default_factory=tuple)

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, those that most checkpoints have first."""
        counts: dict[str, int] = {}
        for point in self.points:
            for name in point.metrics:
                counts[name] = counts.get(name, 0) + 1
        return sorted(counts, key=lambda name: (-counts[name], name))

    def count(self, what: str) -> int:
        """Count the journal's lines of one kind."""
        return sum(entry.what == what for entry in self.journal)

    def median(self, field_name: str) -> float | None:
        """Return the median of a field of the points that have it."""
        values = [value for point in self.points if (value := getattr(point, field_name)) is not None]
        return statistics.median(values) if values else None


def gather(run: Run, modes: Mapping[str, str] | None = None) -> Facts:
    """Look at a run. ``modes``: for metrics, whether the best is the ``min`` or the ``max``; for those whose name ends
    in ``loss`` it is known. Blocks on the disk. Raises ``InvalidOption`` for a mode that is none."""
    policies = {name: KeepBest(name, mode=_mode(mode)) for name, mode in (modes or {}).items()}
    entries = run.ls()
    journal = run.journal()
    points = _points(entries, journal)
    usable = [entry for entry in entries if entry.damage is None and not entry.renamed]
    for name in {name for entry in usable for name in entry.metrics}:
        if name not in policies and name.casefold().endswith("loss"):
            policies[name] = KeepBest(name)
    ranked = {name: policy.ranked(usable) for name, policy in policies.items()}
    wrong = {"failed", "fallback", "verify"}
    return Facts(
        path=run.path,
        entries=entries,
        journal=journal,
        points=points,
        best={name: found[0].name for name, found in ranked.items() if found},
        environments=_environments(run, usable, journal),
        health=[entry for entry in reversed(journal) if entry.what in wrong],
    )


def _mode(text: str) -> Any:
    if text not in ("min", "max"):
        raise InvalidOption(f"a metric's best is its min or its max, not {text!r}")
    return text


def _points(entries: Sequence[CheckpointInfo], journal: Sequence[JournalEntry]) -> list[Point]:
    """Join the rows of ``ls`` with the lines of their saves; what has a line and no row was deleted."""
    saves: dict[str, JournalEntry] = {}
    for line in journal:
        if line.what == "save":
            saves.pop(line.name, None)
            saves[line.name] = line
        elif line.what == "thin" and line.name in saves:  # its weights are there under another name
            saves[line.text("left")] = saves.pop(line.name)
    rows = {entry.name: entry for entry in entries if not entry.renamed and not entry.beside}
    damaged = {
        line.name: bool(line.number("damage")) for line in journal if line.what == "verify"
    }  # the last one counts
    bad = {name for name, is_bad in damaged.items() if is_bad}
    found = [_of_line(name, line, rows.get(name), bad) for name, line in saves.items()]
    found += [_of_row(entry, bad) for name, entry in rows.items() if name not in saves]
    return sorted(found, key=lambda point: (point.at_unix_seconds or 0.0, point.step))


def _state(entry: CheckpointInfo | None, bad: Collection[str]) -> str:
    if entry is None:
        return "deleted"
    return "damaged" if entry.damage is not None or entry.name in bad else "pinned" if entry.pinned else "kept"


def _of_row(entry: CheckpointInfo, bad: Collection[str]) -> Point:
    at = entry.created_unix_seconds or None
    return Point(entry.step, entry.name, entry.kind, _state(entry, bad), at, dict(entry.metrics), entry.nbytes)


def _of_line(name: str, line: JournalEntry, entry: CheckpointInfo | None, bad: Collection[str]) -> Point:
    metrics = line.numbers("metrics") | (dict(entry.metrics) if entry is not None else {})
    return Point(
        step=line.step,
        name=name,
        kind=entry.kind if entry is not None else line.text("kind") or "full",
        state=_state(entry, bad),
        at_unix_seconds=line.at_unix_seconds,
        metrics=metrics,
        nbytes=int(line.number("nbytes") or (entry.nbytes if entry is not None else 0)),
        written_bytes=line.number("written_bytes"),
        state_bytes=line.number("state_bytes"),
        stall_seconds=line.number("stall_seconds"),
        durable_seconds=line.number("durable_seconds"),
    )


def _environments(
    run: Run, usable: Sequence[CheckpointInfo], journal: Sequence[JournalEntry]
) -> list[tuple[float, int, Mapping[str, str]]]:
    found = [
        (line.at_unix_seconds, line.step, line.fields["environment"])
        for line in journal
        if line.what == "save" and isinstance(line.fields.get("environment"), dict)
    ]
    for entry in usable if len(usable) <= _OPENED else ():
        try:
            with run.open_entry(entry) as checkpoint:
                found.append((entry.created_unix_seconds, entry.step, checkpoint.manifest.environment))
        except (AsyncCkptError, OSError):  # deleted meanwhile
            continue
    changes: list[tuple[float, int, Mapping[str, str]]] = []
    for at, step, given in sorted(found, key=lambda one: one[0]):
        versions = {str(key): str(value) for key, value in given.items() if value is not None}
        if not changes or changes[-1][2] != versions:
            changes.append((at, step, versions))
    return changes
