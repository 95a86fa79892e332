"""Staging hands over one unit after the other, each in host memory or on its way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.stage.units import Unit


@dataclass(frozen=True, slots=True)
class StagedUnit:
    """Consecutive extents of one file in staging memory. ``slot``: the memory, which the receiver gives back to the
    arena. ``wait_copied``: blocks until the bytes are there (copies from a device run on a side stream)."""

    unit: Unit
    slot: StagingBuffer
    wait_copied: Callable[[], None]


class UnitSink(Protocol):
    """Receives staged units."""

    def submit(self, staged: StagedUnit) -> None:
        """Take a unit over, with its memory. Thread-safe; never blocks, never raises."""

    def give_memory_back(self) -> None:
        """Write what has been put off: somebody waits for staging memory. Thread-safe; never blocks."""
