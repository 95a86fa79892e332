"""A ``SaveScope`` knows whether one save may still succeed. It is handed down to everything that works on the save."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SaveScope:
    """Keeps the first error of a save, and wakes the threads that wait for its progress. Thread-safe.

    ``step``: the training step that is saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._releases: list[Callable[[], None]] = []
        self._verdicts = 0
        self._judged: list[Callable[[], None]] = []
        #: How long after the call of ``save`` all tensors had been copied; 0.0 until then.
        self.staged_seconds = 0.0
        #: When the save passed the point from which on it may become visible, by ``time.perf_counter``.
        self.publishing_since_seconds: float | None = None

    @property
    def error(self) -> BaseException | None:
        """The error that made the save fail, or None while it may succeed."""
        return self._error

    def raise_if_failed(self) -> None:
        """Raise the error that made the save fail, if it has failed."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Let the save fail with ``error``: nothing of it will be published. Only the first error is kept. The
        functions that ``when_failed`` was given are called once, on this thread. Idempotent; does not block."""
        self._fail(error, visible_too=True)

    def begin_publish(self) -> None:
        """Pass the point from which on the save may become visible, so that nobody can give it up any more. Raises what
        made the save fail, if it has failed by then."""
        with self._changed:
            self.raise_if_failed()
            self.publishing_since_seconds = time.perf_counter()

    def put_off_publish(self) -> None:
        """Go back before that point, where nothing can become visible before ``begin_publish`` is called again."""
        with self._changed:
            self.publishing_since_seconds = None

    def give_up(self, error: BaseException) -> bool:
        """Let the save fail with ``error``, as ``fail`` does, unless it may be visible already. Returns whether it has
        failed: then nothing of it will ever be published."""
        return self._fail(error, visible_too=False)

    def _fail(self, error: BaseException, *, visible_too: bool) -> bool:
        with self._changed:
            if self._error is not None:
                return True
            if self.publishing_since_seconds is not None and not visible_too:
                return False
            self._error = error
            releases, self._releases = self._releases, []
            self._changed.notify_all()
        for release in releases:
            release()
        return True

    def await_verdict(self) -> None:
        """Let nothing be published before ``verdict`` was called once more. Call it before the save has begun."""
        with self._changed:
            self._verdicts += 1

    def verdict(self) -> None:
        """Report that one of the things to wait for was found in order; what is not in order fails the save."""
        with self._changed:
            self._verdicts -= 1
            self._changed.notify_all()
            judged = list(self._judged) if not self._verdicts else []
        for call in judged:
            call()

    def when_judged(self, call: Callable[[], None]) -> None:
        """Have ``call`` called on the thread of each ``verdict`` that is the last one to wait for."""
        with self._changed:
            self._judged.append(call)

    @property
    def judged(self) -> bool:
        """Whether there is no verdict to wait for any more."""
        return self._verdicts == 0

    def when_failed(self, release: Callable[[], None]) -> None:
        """Have ``release`` called when the save fails, or at once where it has failed. ``release`` must not block."""
        with self._changed:
            if self._error is None:
                self._releases.append(release)
                return
        release()

    def end(self) -> None:
        """Forget what ``when_failed`` was given: the save is durable, or has failed. Idempotent."""
        with self._changed:
            self._releases.clear()
            self._judged.clear()

    def notify(self) -> None:
        """Make every thread in ``wait_until`` ask its ``reached`` again."""
        with self._changed:
            self._changed.notify_all()

    def wait_until(self, reached: Callable[[], bool], timeout_seconds: float, *, failed_too: bool = True) -> bool:
        """Block until ``reached()`` is true, for at most ``timeout_seconds``, and return what it says then. With
        ``failed_too`` a failure of the save ends the wait, too. ``reached`` is asked after each ``notify``, with the
        scope's lock held."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not reached() and not (failed_too and self._error is not None):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
            return reached()
