"""The background writer pool, and the handle a save is followed by."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from asyncckpt import forks
from asyncckpt.errors import CheckpointerClosed, InvalidOption

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterOptions:
    """``threads``: writers that hash and write extents. ``direct``: O_DIRECT where the file system has it.
    ``read_back``: read every byte back past the page cache and compare digests before publishing.
    ``durable_timeout_seconds``: after this a save that is not durable is given up (hung storage).
    ``stall_timeout_seconds``: the longest the training thread ever waits, for staging or for the storage when a run
    begins, before the save is given up."""

    threads: int = 3
    direct: bool = True
    read_back: bool = False
    durable_timeout_seconds: float = 3600.0
    stall_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if type(self.threads) is not int or self.threads < 1:
            raise InvalidOption(f"WriterOptions.threads must be a whole number >= 1, not {self.threads!r}")
        for name in ("durable_timeout_seconds", "stall_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidOption(f"WriterOptions.{name} must be > 0, not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """What a durable save was. ``nbytes`` is the checkpoint's size, ``written_bytes`` what of it went to the disk: the
    rest was taken over from the checkpoint before. ``stall_seconds`` is the training thread's time inside asyncckpt;
    ``staged_seconds`` and ``durable_seconds`` are counted from the call of ``save``. ``manifest_digest`` is what
    ``expect_digest`` takes: keep it elsewhere, and no other checkpoint passes for this one."""

    step: int
    path: str
    nbytes: int
    written_bytes: int
    stall_seconds: float
    staged_seconds: float
    durable_seconds: float
    manifest_digest: str = ""


class PendingSave:
    """A save in flight. Thread-safe; awaitable from asyncio (``report = await pending``). In a forked child, one that
    was not done has failed with ``CheckpointerClosed``: only the process that saves learns how it ends."""

    step: int

    def __init__(
        self, step: int, wait_staged: Callable[[float | None], bool], expire: Callable[[], None] = lambda: None
    ) -> None:
        self.step = step
        self._future: Future[SaveReport] = Future()
        self._future.set_running_or_notify_cancel()
        self._wait_staged = wait_staged
        self._expire = expire
        #: Whether somebody has been given the outcome: who waited in vain has not.
        self._observed = False
        #: Of a save that is done; read in a forked child, where the future's lock may be held for ever.
        self._outcome: SaveReport | BaseException | None = None
        forks.disarm_in_child(self)

    def disarm(self) -> None:
        self._future = Future()
        self._wait_staged = lambda _timeout: True
        if isinstance(self._outcome, SaveReport):
            self._future.set_result(self._outcome)
            return
        if self._outcome is None:
            self._outcome = CheckpointerClosed(
                f"step {self.step}: it is saved by the process that this one was forked from; ask there how it ends"
            )
        self._future.set_exception(self._outcome)

    def staged(self, timeout: float | None = None) -> bool:
        """Block until training may change anything (the snapshot is copied, or the save failed); False where
        ``timeout`` seconds passed first."""
        return self._wait_staged(timeout)

    def result(self, timeout: float | None = None) -> SaveReport:
        """Block until the checkpoint is durable.

        Raises what made the save fail (``SaveFailed``, ``NotEnoughSpace``, …), or ``TimeoutError`` after ``timeout``
        seconds (the save goes on).
        """
        self._deliver(timeout)
        return self._future.result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until durable or failed; the error, or None."""
        self._deliver(timeout)
        return self._future.exception(0)

    def done(self) -> bool:
        """Whether it is durable or failed."""
        return self._future.done()

    def failure(self) -> BaseException | None:
        """The error of a save that is done and failed. Does not count as having seen it."""
        return self._future.exception() if self._future.done() else None

    def failed(self) -> bool:
        """Whether it is done and failed. Does not count as having seen the error."""
        return self._future.done() and self._future.exception() is not None

    def add_done_callback(self, callback: Callable[[PendingSave], object]) -> None:
        """Call ``callback(self)`` when durable or failed, on the thread where that happens (at once if it has). What it
        raises is logged."""
        caller = threading.get_ident()

        def call(_: Future[SaveReport]) -> None:
            try:
                callback(self)
            except BaseException as error:
                if threading.get_ident() == caller and not isinstance(error, Exception):  # Ctrl-C, while it is added
                    raise
                # on the committer's thread, this would keep the outcome from whoever else waits for it
                log.exception("step %d: a callback raised", self.step)

        self._future.add_done_callback(call)
        caller = 0

    def __await__(self) -> Generator[Any, None, SaveReport]:
        try:
            report = yield from asyncio.wrap_future(self._future).__await__()
        except BaseException as error:  # the save's own, or whatever ends the waiting: a time limit, a cancelled task
            self._observed = self._observed or error is self.failure()
            raise
        self._observed = True
        return report

    def _deliver(self, timeout: float | None) -> None:
        """Wait until it is done: then the outcome is about to be handed out, and not before."""
        if not self._wait(timeout):
            raise TimeoutError(f"step {self.step}: not done after {timeout} s; the save goes on")
        self._observed = True

    def _wait(self, timeout: float | None) -> bool:
        """Whether it is done within ``timeout`` seconds; asks meanwhile whether the committer hangs in the kernel."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._future.done():
            remaining = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if remaining <= 0:
                return False
            wait([self._future], remaining)
            self._expire()
        return True

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self.failed() else "durable"
        return f"<PendingSave step {self.step}: {state}>"

    def unobserved_error(self) -> BaseException | None:
        """The error of a failed save that nobody has asked for yet; hands it out once."""
        if self._observed or not self._future.done():
            return None
        self._observed = True
        return self._future.exception()

    def resolve(self, report: SaveReport) -> None:
        """For the committer: the save is durable."""
        with contextlib.suppress(InvalidStateError):
            self._future.set_result(report)
            self._outcome = report

    def reject(self, error: BaseException) -> None:
        """For the committer: the save failed. Later outcomes are ignored."""
        with contextlib.suppress(InvalidStateError):
            self._future.set_exception(error)
            self._outcome = error


def failed(step: int, error: BaseException) -> PendingSave:
    """A save that failed before it began."""
    pending = PendingSave(step, lambda _timeout: True)
    pending.reject(error)
    return pending


class WriterPool:
    """Threads that run tasks in order. A task that hangs in the kernel can be abandoned: its thread is replaced, and
    ends when the kernel lets it go. ``niceness``: how far the threads stand back for training (Linux). Thread-safe."""

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
        """Run ``task`` on some thread; it must not raise. The first call starts the threads."""
        with self._start_lock:
            while self._wanted:
                self._wanted -= 1
                self._spawn()
        self._tasks.put(task)

    def replace_stuck(self, stuck_seconds: float) -> int:
        """Replace threads that have been inside one task for longer than ``stuck_seconds``; how many."""
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
        threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True).start()

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
#: How far encoding stands back: it is work for the processor, which training may need more.
_ENCODING_NICENESS = 10


class Pools:
    """The threads of one checkpointer. ``writing``: digests and writes of extents. ``small``: the same of shards that
    are small, where there are many. ``encoding``: codecs. Threads start with the first task of their pool."""

    def __init__(self, threads: int) -> None:
        self.writing = WriterPool(threads)
        self.small = WriterPool(_SMALL_THREADS, "asyncckpt-small")
        self.encoding = WriterPool(threads, "asyncckpt-encoder", niceness=_ENCODING_NICENESS)

    def replace_stuck(self, stuck_seconds: float) -> int:
        """Replace threads that have been inside one task for longer than ``stuck_seconds``; how many."""
        return sum(pool.replace_stuck(stuck_seconds) for pool in (self.writing, self.small, self.encoding))

    def close(self) -> None:
        """End the threads after what was submitted. Does not wait."""
        for pool in (self.writing, self.small, self.encoding):
            pool.close()
