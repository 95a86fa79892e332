"""The calls of a training loop: one at a time, whole before a signal is acted on, and none once the run is closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

from asyncckpt import interrupts
from asyncckpt.errors import ArenaBusy, CheckpointerClosed


class _Lock(Protocol):
    def acquire(self, *, timeout: float) -> bool: ...


class TrainingCalls:
    """Keeps the calls of one checkpointer apart. Thread-safe: callbacks save, too, and others close.

    ``path``: the run's. ``patience_seconds``: how long a call waits for one of another thread.
    """

    def __init__(self, path: str, patience_seconds: float) -> None:
        self._path = path
        self._patience_seconds = patience_seconds
        self._running = threading.RLock()
        self._ending = threading.RLock()
        self._ends = False

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Run the body while no other thread runs one; signals that come meanwhile wait, as ``interrupts`` says. Raises
        ``ArenaBusy`` where another thread's call lasts too long, and ``CheckpointerClosed`` once ``ending`` was
        entered."""
        with interrupts.deferred():
            if not self._wait(self._running, self._patience_seconds):
                raise ArenaBusy(
                    f"{self._path}: a call of another thread has not returned for {self._patience_seconds:.0f} s"
                )
            try:
                if self._ends:
                    raise CheckpointerClosed(f"{self._path}: this Checkpointer is being closed; make a new one")
                yield
            finally:
                self._running.release()

    @contextlib.contextmanager
    def ending(self, *, at_once: bool) -> Iterator[bool]:
        """Run the body, which closes the run, after the call that runs now, and let none begin after it. Yields False
        where another thread closes already: after that one has, or, with ``at_once``, without waiting for it."""
        with interrupts.deferred():
            if not self._wait(self._ending, 0.0 if at_once else None):
                yield False
                return
            try:
                if self._ends:  # it is closed, or this very thread closes: a signal's handler has called
                    yield False
                    return
                if self._wait(self._running, self._patience_seconds):
                    self._running.release()
                self._ends = True  # in any case: a call that hangs must not keep the run open for ever
                yield True
            finally:
                self._ending.release()

    def _wait(self, lock: _Lock, timeout_seconds: float | None) -> bool:
        return interrupts.wait_for(lambda seconds: lock.acquire(timeout=seconds), timeout_seconds)
