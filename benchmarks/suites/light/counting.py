"""A thread that counts in pure Python shows what others take of the interpreter: what it would have counted alone, less
what it has counted, is time that it had to wait."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

#: So many additions are one look at the clock: about 0.1 ms.
_ADDITIONS_A_LOOK = 2000


@dataclass(frozen=True, slots=True)
class Counted:
    """Says what a stretch of time was for the counting thread. ``looks`` is how often it got to the clock in
    ``seconds``, ``longest_seconds`` the longest time between two of them."""

    seconds: float
    looks: int
    longest_seconds: float

    def lost_seconds(self, quiet_rate: float) -> float:
        """Return how long the thread had to wait, compared with ``quiet_rate`` looks a second."""
        return self.seconds - self.looks / quiet_rate

    @property
    def rate(self) -> float:
        """Looks at the clock a second."""
        return self.looks / self.seconds


class Counter:
    """Counts on a thread of its own, inside ``with``. ``stretch`` ends one stretch of time and begins the next."""

    def __init__(self) -> None:
        self._ended = False
        self._looks = 0
        self._longest_seconds = 0.0
        self._since = time.perf_counter()
        self._thread = threading.Thread(target=self._count, name="counting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended = True
        self._thread.join()

    def stretch(self) -> Counted:
        """Return what was counted since the call before, or since the start. For one thread."""
        now = time.perf_counter()
        counted = Counted(now - self._since, self._looks, self._longest_seconds)
        self._looks, self._longest_seconds, self._since = 0, 0.0, now
        return counted

    def _count(self) -> None:
        last = time.perf_counter()
        while not self._ended:
            total = 0
            for number in range(_ADDITIONS_A_LOOK):
                total += number
            now = time.perf_counter()
            self._looks += 1
            self._longest_seconds = max(self._longest_seconds, now - last)
            last = now


class FullCollections:
    """Counts the garbage collections of the oldest generation, inside ``with``."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        gc.collect()
        gc.callbacks.append(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gc.callbacks.remove(self._called)

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            self.count += 1
