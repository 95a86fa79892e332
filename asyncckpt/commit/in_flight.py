"""Saves that are neither durable nor failed yet, and what belongs to each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from asyncckpt.catalog.steps import Claim
from asyncckpt.commit.pending import PendingSave
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import PendingDirectory
from asyncckpt.scope import SaveScope
from asyncckpt.stage.job import StagingJob
from asyncckpt.stage.staged import UnitSink
from asyncckpt.write.reuse import ReusableFile


class SaveShards(UnitSink, Protocol):
    """Writes the staged extents of one save, in this process or another."""

    def unwritten_bytes(self) -> int:
        """Estimate the bytes that this save will still take from the disk."""

    def files(self) -> Mapping[str, ReusableFile] | None:
        """List the files of a durable save by name, as the next one compares with them; None where another process
        knows them."""

    def replace_stuck_threads(self, stuck_seconds: float) -> None:
        """Replace writer threads that have been inside one system call for longer than that."""


class Save(Protocol):
    """One attempt to write one checkpoint, as the committer sees it. Its methods are described by ``SaveTransaction``,
    which is one that threads of this process write."""

    @property
    def step(self) -> int: ...

    @property
    def scope(self) -> SaveScope: ...

    @property
    def contents(self) -> Contents: ...

    @property
    def shards(self) -> SaveShards: ...

    @property
    def started_seconds(self) -> float: ...

    @property
    def written_seconds(self) -> float: ...

    def written_bytes(self, written: Manifest, /) -> int: ...

    def descend_from(self, attempt: str) -> None: ...

    def commit(
        self,
        check_lease: Callable[[], None],
        timeout_seconds: float,
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest: ...

    def discard(self, timeout_seconds: float) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """Holds a save and everything that belongs to it. ``claim``: the step that it has reserved."""

    save: Save
    job: StagingJob
    pending: PendingSave
    claim: Claim


class InFlightSaves:
    """Lists all saves of a checkpointer that have not ended, the oldest first. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._flights: list[InFlight] = []
        self._ending: list[InFlight] = []

    def add(self, flight: InFlight) -> None:
        """Add a save that has begun."""
        with self._changed:
            self._flights.append(flight)

    def begin_end(self, flight: InFlight) -> bool:
        """Whether the caller is the one to end this save: true once. Nobody is told of the end before ``remove``."""
        with self._changed:
            if flight not in self._flights or flight in self._ending:
                return False
            self._ending.append(flight)
            return True

    def remove(self, flight: InFlight) -> None:
        """Remove a save that has ended, and wake whoever waits for that. ``told`` follows."""
        with self._changed:
            self._flights.remove(flight)
            self._changed.notify_all()

    def told(self, flight: InFlight) -> None:
        """Note that whoever wants to hear of the end of this save, which was removed, has been put on the list of those
        who will."""
        with self._changed:
            self._ending.remove(flight)
            self._changed.notify_all()

    def wait_told(self, timeout_seconds: float) -> bool:
        """Block until ``told`` was called of every save that was removed; False where ``timeout_seconds`` passed
        first."""
        with self._changed:
            return self._changed.wait_for(lambda: all(one in self._flights for one in self._ending), timeout_seconds)

    def all(self) -> list[InFlight]:
        """Return a copy of the list. Takes no lock, as each training step calls it: an exception of a signal's handler
        could come while the lock is taken, which would then be held for ever."""
        return list(self._flights)

    def wait_below(self, count: int, timeout_seconds: float) -> bool:
        """Block until fewer than ``count`` are left; return False where ``timeout_seconds`` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._flights) < count, max(0.0, timeout_seconds))
