"""What staging hands over: one extent in host memory, or on its way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from asyncckpt.memory.arena import Slot


@dataclass(frozen=True, slots=True)
class StagedExtent:
    """``index``: the extent's place in the layout. ``slot``: the memory that it is staged in, which whoever takes it
    gives back to the arena. ``wait_copied``: blocks until its bytes are there (copies of a device run on a side
    stream). ``digest``: of its content, where it has been taken already; None otherwise."""

    index: int
    slot: Slot
    wait_copied: Callable[[], None]
    digest: str | None = None


class ExtentSink(Protocol):
    """Where staged extents go."""

    def submit(self, extent: StagedExtent) -> None:
        """Take an extent over, with its memory. Thread-safe; never blocks, never raises."""
