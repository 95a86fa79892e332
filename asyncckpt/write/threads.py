"""Pools of the background threads that hash, encode and write."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

log = logging.getLogger("asyncckpt")


class WriterPool:
    """Runs tasks on its threads, in the order submitted. A task that hangs in the kernel can be abandoned: its thread
    is replaced, and ends when the kernel lets it go. ``niceness`` is added to that of the threads, so that training
    goes first (Linux). Thread-safe."""

    def __init__(self, threads: int, name: str = "asyncckpt-writer", *, niceness: int = 0) -> None:
        self._name = name
        self._niceness = niceness
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._start_lock = threading.Lock()
        self._busy_since: dict[int, float] = {}
        self._abandoned: set[int] = set()
        self._wanted = threads
        self._threads = 0
        self._spawned = 0

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` on some thread; it must not raise. The first call starts the threads. Where the system gives no
        more of them, those that there are do the work. Raises ``RuntimeError``, and takes no task, where there is
        none."""
        with self._start_lock:
            while self._wanted:
                try:
                    self._spawn()
                except RuntimeError:  # the next task tries again
                    if not self._threads:
                        raise
                    break
                self._wanted -= 1
        self._tasks.put(task)

    def replace_stuck(self, stuck_seconds: float) -> int:
        """Replace threads that have been inside one task for longer than ``stuck_seconds``; return how many."""
        now = time.monotonic()
        with self._lock:
            stuck = [
                ident
                for ident, since in self._busy_since.items()
                if now - since > stuck_seconds and ident not in self._abandoned
            ]
            self._abandoned.update(stuck)
        for _ in stuck:
            self._spawn()
        return len(stuck)

    def close(self) -> None:
        """End the threads after the tasks already submitted. Does not wait."""
        for _ in range(self._threads):
            self._tasks.put(None)

    def _spawn(self) -> None:
        with self._lock:
            self._threads += 1
            self._spawned += 1
            number = self._spawned
        try:
            threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True).start()
        except BaseException:
            with self._lock:
                self._threads -= 1
            raise

    def _run(self) -> None:
        ident = threading.get_ident()
        if self._niceness and hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):  # a thread has a priority of its own on Linux
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + self._niceness)
        while (task := self._tasks.get()) is not None:
            with self._lock:
                self._busy_since[ident] = time.monotonic()
            try:
                task()
            except BaseException:
                log.exception("a writer task raised")
            del task  # an idle thread must not keep a save's memory alive
            with self._lock:
                del self._busy_since[ident]
                if ident in self._abandoned:
                    self._abandoned.discard(ident)
                    self._threads -= 1
                    return


#: Small files written at one time: each is a write and an fsync, which the device can do together.
_SMALL_THREADS = 8
#: Encoding is work for the processor, which training may need more.
_ENCODING_NICENESS = 10


class Holding(Protocol):
    """Holds tasks back."""

    def flush(self) -> None:
        """Start all of them. Idempotent; never blocks."""


class Pools:
    """Holds the thread pools of one checkpointer. ``writing`` digests and writes extents; ``small`` does it for small
    shards, where there are many; ``encoding`` runs codecs. Threads start with the first task of their pool."""

    def __init__(self, threads: int) -> None:
        self.writing = WriterPool(threads)
        self.small = WriterPool(_SMALL_THREADS, "asyncckpt-small")
        self.encoding = WriterPool(threads, "asyncckpt-encoder", niceness=_ENCODING_NICENESS)
        #: What holds tasks back that are to run on ``small`` later, and memory with them.
        self._holding: list[Holding] = []
        self._lock = threading.Lock()

    def add_holding(self, holding: Holding) -> None:
        """Have ``holding`` asked to start its tasks whenever somebody waits for memory."""
        with self._lock:
            self._holding.append(holding)

    def remove_holding(self, holding: Holding) -> None:
        """Undo ``add_holding``. Idempotent."""
        with self._lock, contextlib.suppress(ValueError):
            self._holding.remove(holding)

    def start_held(self) -> None:
        """Start all tasks that are held back. Never blocks."""
        with self._lock:
            holding = list(self._holding)
        for one in holding:
            one.flush()

    def replace_stuck(self, stuck_seconds: float) -> int:
        """Replace threads that have been inside one task for longer than ``stuck_seconds``; return how many."""
        return sum(pool.replace_stuck(stuck_seconds) for pool in (self.writing, self.small, self.encoding))

    def close(self) -> None:
        """End the threads after the tasks already submitted. Does not wait."""
        for pool in (self.writing, self.small, self.encoding):
            pool.close()
