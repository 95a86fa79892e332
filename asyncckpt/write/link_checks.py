"""A file that is linked from save to save is read back a part at a time, so that damage to it does not live on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.memory.arena import Arena

#: A save reads back as many bytes of what it links as it writes, but at least and at most so many.
_LEAST_BYTES: Final = 64 << 20
_MOST_BYTES: Final = 1 << 30
#: A read costs at least as much as reading so many bytes: this bounds the reads that a save of many tiny files makes.
_LEAST_COST_BYTES: Final = 256 << 10
#: A thread that waits to read back looks this often whether training waits for memory.
_LOOK_SECONDS: Final = 0.005


class LinkChecks:
    """Remembers, from save to save, which extents of linked files have been read back in this round. A round ends with
    the save that had bytes left for all that it linked, and the next save begins another. Thread-safe; never blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int]] = set()

    def begin(self, written_bytes: int) -> LinkRound:
        """Begin the part of a round that one save does. ``written_bytes``: how much it writes itself."""
        return LinkRound(self._lock, self._seen, min(max(written_bytes, _LEAST_BYTES), _MOST_BYTES))


class LinkRound:
    """Chooses the extents that one save reads back, within its number of bytes; one of them whatever its size.
    Thread-safe; never blocks."""

    def __init__(self, lock: threading.Lock, seen: set[tuple[str, int]], nbytes: int) -> None:
        self._lock = lock
        self._seen = seen
        self._left = nbytes
        self._untouched = True
        self._reached_all = True

    def take(self, file: str, number: int, nbytes: int) -> bool:
        """Return whether it is this extent's turn, and count it as read back then."""
        cost = max(nbytes, _LEAST_COST_BYTES)
        with self._lock:
            if (file, number) in self._seen:
                return False
            if cost > self._left and not self._untouched:
                self._reached_all = False
                return False
            self._untouched = False
            self._left -= cost
            self._seen.add((file, number))
            return True

    def give_back(self, file: str, number: int, nbytes: int) -> None:
        """Take an extent's turn back: it was not read after all, and a later save will."""
        with self._lock:
            self._left += max(nbytes, _LEAST_COST_BYTES)
            self._seen.discard((file, number))
            self._reached_all = False

    def end(self) -> None:
        """Note that the save has linked all that it will link."""
        with self._lock:
            if self._reached_all:
                self._seen.clear()


class ReadBack:
    """Reads back what it is the turn of in one save of this ``kind``. One extent is read at a time, so that other
    threads go on, and while somebody waits for memory of the ``arena``, almost none. Thread-safe."""

    def __init__(self, arena: Arena, kind: str) -> None:
        self._arena = arena
        self._kind = kind
        self._round: LinkRound | None = None
        self._reading = threading.Lock()
        self._has_read_while_short = False

    def begin(self, checks: LinkChecks, written_bytes: int) -> None:
        """Begin the save's part of a round; see ``LinkChecks.begin``. Before that, nothing is read."""
        self._round = checks.begin(written_bytes)

    def end(self) -> None:
        """Note that the save has linked all that it will link. Idempotent."""
        if self._round is not None:
            self._round.end()

    def check(
        self, file: str, number: int, nbytes: int, read: Callable[[], object], *, wait: bool = False
    ) -> Exception | None:
        """Call ``read`` where it is the extent's turn, and return what it raises because the bytes are not what they
        were; None in all other cases. ``wait``: whether somebody waits for memory is not asked. Blocks."""
        turn = f"{self._kind}/{file}", number, nbytes
        if self._round is None or not self._round.take(*turn):
            return None
        if wait:
            self._reading.acquire()
        elif not self._may_read():
            self._round.give_back(*turn)
            return None
        try:
            read()
        except (CheckpointDamaged, OSError) as error:
            return error
        finally:
            self._reading.release()
        return None

    def _may_read(self) -> bool:
        """Wait until no other thread reads back, and return True with ``_reading`` held; False where training waits for
        memory meanwhile. Then one extent of the save is read, because some have to be."""
        while not self._reading.acquire(timeout=_LOOK_SECONDS):
            if self._arena.waiting:
                return False
        if not self._arena.waiting:
            return True
        if self._has_read_while_short:
            self._reading.release()
            return False
        self._has_read_while_short = True
        return True
