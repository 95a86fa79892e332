"""Saves that are neither durable nor failed yet, and what belongs to each."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncckpt.catalog.steps import Claim
from asyncckpt.commit.pending import PendingSave
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.stage.job import StagingJob


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """A save and everything that belongs to it. ``claim``: its step. ``deferred``: the tensors that are copied while
    training goes on."""

    save: SaveTransaction
    job: StagingJob
    pending: PendingSave
    claim: Claim
    deferred: Sequence[torch.Tensor] = ()


class InFlightSaves:
    """All of a checkpointer's, the oldest first. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._flights: list[InFlight] = []
        self._ending: list[InFlight] = []

    def add(self, flight: InFlight) -> None:
        """This one has begun."""
        with self._changed:
            self._flights.append(flight)

    def begin_end(self, flight: InFlight) -> bool:
        """Whether the caller is the one to end this save: true once, and nobody is told of it before ``remove``."""
        with self._changed:
            if flight not in self._flights or flight in self._ending:
                return False
            self._ending.append(flight)
            return True

    def remove(self, flight: InFlight) -> None:
        """This one has ended: who waits for that goes on."""
        with self._changed:
            self._flights.remove(flight)
            self._ending.remove(flight)
            self._changed.notify_all()

    def all(self) -> list[InFlight]:
        """Those that have not ended, as they are now."""
        with self._changed:
            return list(self._flights)

    def wait_below(self, count: int, timeout_seconds: float) -> bool:
        """Block until fewer than ``count`` are left; False where that many seconds passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._flights) < count, max(0.0, timeout_seconds))
