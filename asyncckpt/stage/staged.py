"""Staging hands over one extent after the other, each in host memory or on its way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.types import StagedDigests


@dataclass(frozen=True, slots=True)
class StagedExtent:
    """An extent in staging memory. ``index``: its position in the layout. ``slot``: the memory, which the receiver
    gives back to the arena. ``wait_copied``: blocks until the bytes are there (copies from a device run on a side
    stream). ``digests``: those of its bytes where they have been taken already, else None."""

    index: int
    slot: StagingBuffer
    wait_copied: Callable[[], None]
    digests: StagedDigests | None = None


class ExtentSink(Protocol):
    """Receives staged extents."""

    def submit(self, extent: StagedExtent) -> None:
        """Take an extent over, with its memory. Thread-safe; never blocks, never raises."""

    def give_memory_back(self) -> None:
        """Write what has been put off: somebody waits for staging memory. Thread-safe; never blocks."""
