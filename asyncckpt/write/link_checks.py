"""A file that is linked from save to save is read back a part at a time, so that damage to it does not live on."""

from __future__ import annotations

import threading
from typing import Final

#: A save reads back as many bytes of what it links as it writes, but at least and at most so many.
_LEAST_BYTES: Final = 64 << 20
_MOST_BYTES: Final = 1 << 30
#: A read costs at least as much as reading so many bytes: this bounds the reads that a save of many tiny files makes.
_LEAST_COST_BYTES: Final = 256 << 10


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
