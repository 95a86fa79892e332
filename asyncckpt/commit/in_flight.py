"""Saves that are neither durable nor failed yet, and what belongs to each."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from asyncckpt.catalog.steps import Claim
from asyncckpt.commit.pending import PendingSave
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.stage.job import StagingJob


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """Holds a save and everything that belongs to it. ``claim``: the step that it has reserved."""

    save: SaveTransaction
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
