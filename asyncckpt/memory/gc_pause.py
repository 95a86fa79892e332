"""Python's garbage collection pauses while this library allocates many objects that stay."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from asyncckpt import forks


class _Pause:
    """Counts who wants no collection at the moment, and keeps the thresholds from before. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._before = gc.get_threshold()
        forks.disarm_in_child(self)

    def begin(self) -> None:
        """Pause collection, unless it pauses already."""
        with self._lock:
            if not self._held:
                self._before = gc.get_threshold()
                gc.set_threshold(0, *self._before[1:])
            self._held += 1

    def end(self) -> None:
        """Go on with collection, unless somebody else still wants none."""
        with self._lock:
            self._held -= 1
            if not self._held:
                self._restore()

    def disarm(self) -> None:
        """End the pause in a forked child, where the threads that asked for it do not exist."""
        self._lock = threading.Lock()
        if self._held:
            self._held = 0
            self._restore()

    def _restore(self) -> None:
        if gc.get_threshold()[0] == 0:  # otherwise somebody has set other thresholds meanwhile, which stay
            gc.set_threshold(*self._before)


_pause = _Pause()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause automatic garbage collection on all threads while the ``with`` block, or the decorated function, runs.

    To plan a restore allocates many objects and no garbage, and in a process that has imported torch each full
    collection stops all threads for some 150 ms. The pause changes only the thresholds: a training loop that meanwhile
    switches the collector off or on, or sets thresholds itself, finds what it has set. Pauses may nest. Thread-safe.
    """
    _pause.begin()
    try:
        yield
    finally:
        _pause.end()
