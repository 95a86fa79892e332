"""``PendingSave`` is the handle of a save in flight; ``SaveReport`` describes one that is durable."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass
from typing import Any

from asyncckpt import forks, interrupts
from asyncckpt.errors import CheckpointerClosed
from asyncckpt.notifier import Notifier
from asyncckpt.scope import SaveScope
from asyncckpt.stage.job import StagingJob

log = logging.getLogger("asyncckpt")

#: Whoever awaits a save looks so often whether its time is over.
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """Describes a durable save. ``nbytes`` is the checkpoint's size in bytes, ``written_bytes`` the part of it that
    this process wrote: the rest was taken over from the checkpoint before, or written by other ranks.
    ``stall_seconds`` is the training thread's time inside asyncckpt until the save was durable; ``staged_seconds``
    and ``durable_seconds`` are counted from the call of ``save``. ``manifest_digest`` is what ``expect_digest`` takes
    (empty on ranks other than 0): keep it elsewhere, and no other checkpoint passes for this one."""

    step: int
    path: str
    nbytes: int
    written_bytes: int
    stall_seconds: float
    staged_seconds: float
    durable_seconds: float
    manifest_digest: str = ""


@dataclass(frozen=True, slots=True)
class Overdue:
    """Says when a save is given up because its committer hangs in the kernel and reports nothing. ``at_seconds``: by
    ``time.perf_counter``. ``error``: what the save then fails with. ``unknown``: the same where the save hangs while it
    is made visible, which may still happen; that may take ``grace_seconds``."""

    scope: SaveScope
    at_seconds: float
    grace_seconds: float
    error: BaseException
    unknown: BaseException

    def give_up(self) -> BaseException | None:
        """Give the save up if its time has come, and return the error that it ends with; None before that. Never
        blocks."""
        now = time.perf_counter()
        if now <= self.at_seconds:
            return None
        if self.scope.give_up(self.error):
            return self.error
        since = self.scope.publishing_since_seconds
        return self.unknown if since is not None and now > since + self.grace_seconds else None


class PendingSave:
    """Follows a save to its end. Thread-safe; awaitable from asyncio (``report = await pending``). In a forked child, a
    save that was not done has failed with ``CheckpointerClosed``: only the process that saves learns how it ends.

    An error that ``result``, ``exception`` or ``await`` has handed out is not raised again by the checkpointer."""

    step: int

    def __init__(
        self,
        step: int,
        notifier: Notifier | None = None,
        job: StagingJob | None = None,
        overdue: Overdue | None = None,
    ) -> None:
        self.step = step
        self._notifier = notifier or Notifier()
        self._lock = threading.Lock()
        #: What ``add_done_callback`` was given; None once it was posted.
        self._callbacks: list[Callable[[PendingSave], object]] | None = []
        self._future: Future[SaveReport] = Future()
        self._future.set_running_or_notify_cancel()
        self._job = job
        self._overdue = overdue
        #: Whether somebody has been given the outcome; a wait that timed out has given nobody any.
        self._observed = False
        #: The outcome once the save is done, for a forked child, where the future's lock may be held for ever.
        self._outcome: SaveReport | BaseException | None = None
        forks.disarm_in_child(self)

    def disarm(self) -> None:
        self._future = Future()
        self._lock = threading.Lock()
        self._callbacks = None
        self._job = None
        if isinstance(self._outcome, SaveReport):
            self._future.set_result(self._outcome)
            return
        if self._outcome is None:
            self._outcome = CheckpointerClosed(
                f"step {self.step}: it is saved by the process that this one was forked from; ask there how it ends"
            )
        self._future.set_exception(self._outcome)

    def staged(self, timeout: float | None = None) -> bool:
        """Block until training may change anything: the snapshot is copied (CUDA: the copies are enqueued), or the
        save failed. Returns False where ``timeout`` seconds passed first. Does not raise what made the save fail."""
        if self._job is None:
            return True
        with interrupts.deferred():
            return interrupts.wait_for(self._job.wait, timeout)

    def result(self, timeout: float | None = None) -> SaveReport:
        """Block until the checkpoint is durable, and return its report.

        Raises what made the save fail (``SaveFailed``, ``NotEnoughSpace``, ``LeaseLost``, ``RanksDisagree``, …), or
        ``TimeoutError`` after ``timeout`` seconds (the save goes on). Without ``timeout`` the wait still ends: a save
        is given up after ``WriterOptions.durable_timeout_seconds``.
        """
        self._deliver(timeout)
        return self._future.result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until the save is durable or failed, and return the error, or None. Raises ``TimeoutError`` after
        ``timeout`` seconds."""
        self._deliver(timeout)
        return self._future.exception(0)

    def done(self) -> bool:
        """Whether the save is durable or failed. Never blocks."""
        return self._future.done()

    def failure(self) -> BaseException | None:
        """Return the error of a save that has failed; None for any other. Never blocks, and does not count as having
        seen the error."""
        return self._future.exception() if self._future.done() else None

    def failed(self) -> bool:
        """Whether the save has failed. Never blocks, and does not count as having seen the error."""
        return self._future.done() and self._future.exception() is not None

    def add_done_callback(self, callback: Callable[[PendingSave], object]) -> None:
        """Call ``callback(self)`` once the save is durable or failed: on a thread that the callbacks and subscribers of
        a checkpointer share, after the save was taken off its list, so ``callback`` may block and may call anything; or
        at once on this thread if that has happened. What ``callback`` raises is logged. ``close`` waits for it."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return
        try:
            callback(self)
        except Exception:
            log.exception("step %d: a callback raised", self.step)

    def announce(self) -> None:
        """Called by the committer: have the callbacks called, as the save is on no list any more. Idempotent; does not
        block."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            what = f"step {self.step}: a callback"
            self._notifier.post(what, functools.partial(callback, self))

    def __await__(self) -> Generator[Any, None, SaveReport]:
        try:
            report = yield from self._awaited().__await__()
        except BaseException as error:  # the save's own, or whatever ends the waiting: a time limit, a cancelled task
            self._observed = self._observed or error is self.failure()
            raise
        self._observed = True
        return report

    async def _awaited(self) -> SaveReport:
        """Wait as ``result`` does, on an event loop."""
        wrapped = asyncio.wrap_future(self._future)
        while not wrapped.done():
            await asyncio.wait([wrapped], timeout=_LOOK_SECONDS)
            self._expire()
        return wrapped.result()

    def _deliver(self, timeout: float | None) -> None:
        """Wait until the save is done, and mark its outcome as seen: the caller hands it out. Raises
        ``TimeoutError``."""
        with interrupts.deferred():
            done = self._wait(timeout)
        if not done:
            raise TimeoutError(f"step {self.step}: not done after {timeout} s; the save goes on")
        self._observed = True

    def _wait(self, timeout: float | None) -> bool:
        """Whether the save is done within ``timeout`` seconds. Gives it up where the committer hangs in the kernel."""

        def done(seconds: float) -> bool:
            wait([self._future], seconds)
            self._expire()
            return self._future.done()

        return self._future.done() or interrupts.wait_for(done, timeout)

    def _expire(self) -> None:
        error = self._overdue.give_up() if self._overdue is not None and not self._future.done() else None
        if error is not None:
            self.reject(error)

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self.failed() else "durable"
        return f"<PendingSave step {self.step}: {state}>"

    def unobserved_error(self) -> BaseException | None:
        """Return the error of a failed save that nobody has been given yet, and mark it as seen; None otherwise."""
        if self._observed or not self._future.done():
            return None
        self._observed = True
        return self._future.exception()

    def resolve(self, report: SaveReport) -> None:
        """Called by the committer: the save is durable. Later outcomes are ignored."""
        with contextlib.suppress(InvalidStateError):
            self._future.set_result(report)
            self._outcome = report

    def reject(self, error: BaseException) -> None:
        """Called by the committer: the save failed. Later outcomes are ignored."""
        with contextlib.suppress(InvalidStateError):
            self._future.set_exception(error)
            self._outcome = error


def failed(step: int, error: BaseException) -> PendingSave:
    """Return the handle of a save that failed before it began."""
    pending = PendingSave(step)
    pending.reject(error)
    pending.announce()
    return pending
