"""The background process maps the trainer's arena, and gives slots of it back by telling the trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from asyncckpt.background.wire import HandedUnit
from asyncckpt.memory.arena import Arena, StagingBuffer
from asyncckpt.memory.region import address_of, map_shared


class UnitName(NamedTuple):
    """Which unit lies in a slot."""

    save: int
    first: int


class MappedArena(Arena):
    """An arena whose memory another process hands out. ``given_back``: called with each unit whose slot is released.
    Thread-safe."""

    def __init__(self, given_back: Callable[[UnitName], None]) -> None:
        super().__init__()
        self._given_back = given_back
        self._views: dict[int, memoryview] = {}
        self._names: dict[tuple[int, int], UnitName] = {}

    def add(self, number: int, fd: int, nbytes: int) -> None:
        """Map a region, by the descriptor of its memory, which is closed. Blocks while its pages are mapped."""
        try:
            self._views[number] = map_shared(fd, nbytes)
        finally:
            os.close(fd)

    def slot(self, unit: HandedUnit) -> StagingBuffer:
        """Return the slot that a unit lies in."""
        view = self._views[unit.region][unit.offset : unit.offset + unit.nbytes]
        self._names[unit.region, unit.offset] = UnitName(unit.save, unit.first)
        return StagingBuffer(unit.region, unit.offset, unit.nbytes, address_of(view), view, unit.split)

    def release(self, slot: StagingBuffer) -> None:
        """Give a slot back to the trainer. A buffer of this process's own, which has no region, needs no giving
        back."""
        name = self._names.pop((slot.region, slot.offset), None)
        if name is not None:
            self._given_back(name)
