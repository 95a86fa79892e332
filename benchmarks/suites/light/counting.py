"""A thread that counts in pure Python shows what others take of the interpreter: time in which it neither runs nor
waits for a core is time in which it waits for the interpreter. Linux says how long a thread has run and waited for a
core, so a machine with few cores measures the same as one with many."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

#: So many additions are one look at the clock: about 0.1 ms.
_ADDITIONS_A_LOOK = 2000
_SCHEDSTAT = "/proc/self/task/{}/schedstat"


@dataclass(frozen=True, slots=True)
class Counted:
    """Says what a stretch of time was for the counting thread: ``seconds`` in all, ``lost_seconds`` of them without the
    interpreter, and without it at once ``longest_seconds`` at most."""

    seconds: float
    lost_seconds: float
    longest_seconds: float


class Counter:
    """Counts on a thread of its own, inside ``with``. ``stretch`` ends one stretch of time and begins the next. Raises
    ``OSError`` where the system does not say how long a thread waits for a core (Linux does)."""

    def __init__(self) -> None:
        self._ended = False
        self._asked, self._answered = threading.Event(), threading.Event()
        self._longest_seconds = 0.0
        self._thread = threading.Thread(target=self._count, name="counting", daemon=True)
        self._began: tuple[float, float] = 0.0, 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        self._began = time.perf_counter(), self._busy_seconds()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended = True
        self._thread.join()

    def stretch(self) -> Counted:
        """Return what was counted since the call before, or since the start. For one thread. Blocks until the counting
        thread has looked at the clock once more: what kept the interpreter until now is seen only then."""
        now = time.perf_counter(), self._busy_seconds()
        self._answered.clear()
        self._asked.set()
        self._answered.wait()
        seconds = now[0] - self._began[0]
        counted = Counted(seconds, seconds - (now[1] - self._began[1]), self._longest_seconds)
        self._began = now
        return counted

    def _busy_seconds(self) -> float:
        """Return how long the counting thread has run and waited for a core so far."""
        thread = self._thread
        with open(_SCHEDSTAT.format(thread.native_id), "rb") as file:
            waited = _waited_seconds(file.read())
        return waited + time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))

    def _count(self) -> None:
        fd = os.open(_SCHEDSTAT.format(threading.get_native_id()), os.O_RDONLY)
        try:
            longest_seconds = 0.0
            last, last_busy = time.perf_counter(), time.thread_time() + _waited_seconds(os.pread(fd, 100, 0))
            while not self._ended:
                total = 0
                for number in range(_ADDITIONS_A_LOOK):
                    total += number
                now, busy = time.perf_counter(), time.thread_time() + _waited_seconds(os.pread(fd, 100, 0))
                longest_seconds = max(longest_seconds, now - last - (busy - last_busy))
                last, last_busy = now, busy
                if self._asked.is_set():
                    self._asked.clear()
                    self._longest_seconds, longest_seconds = longest_seconds, 0.0
                    self._answered.set()
        finally:
            os.close(fd)


def _waited_seconds(schedstat: bytes) -> float:
    """Return how long a thread was ready to run and waited for a core."""
    return int(schedstat.split()[1]) / 1e9


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
