"""Garbage collection held back while much is allocated that stays."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from asyncckpt import forks


class _Pause:
    """How many want no collection at the moment, and the thresholds from before. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._before = gc.get_threshold()
        forks.disarm_in_child(self)

    def begin(self) -> None:
        with self._lock:
            if not self._held:
                self._before = gc.get_threshold()
                gc.set_threshold(0, *self._before[1:])
            self._held += 1

    def end(self) -> None:
        with self._lock:
            self._held -= 1
            if not self._held:
                self._restore()

    def disarm(self) -> None:
        """In a forked child: whoever held collection back is not there."""
        self._lock = threading.Lock()
        if self._held:
            self._held = 0
            self._restore()

    def _restore(self) -> None:
        if gc.get_threshold()[0] == 0:  # else somebody has set thresholds of his own meanwhile
            gc.set_threshold(*self._before)


_pause = _Pause()


@contextmanager
def gc_paused() -> Iterator[None]:
    """No automatic garbage collection meanwhile, on any thread. Planning a restore allocates many objects and no
    garbage, and in a process with torch in it every look of the collector at all that lives takes some 150 ms, of all
    threads.

    Works by the thresholds alone: a training loop that switches the collector off or on meanwhile, or sets thresholds,
    finds it as it left it. Thread-safe."""
    _pause.begin()
    try:
        yield
    finally:
        _pause.end()
