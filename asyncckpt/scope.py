"""Whether one save may still succeed. Made once a save, and handed down to everything that works on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SaveScope:
    """The first error of a save, and the threads that wait for its progress. Thread-safe.

    ``step``: the training step that is saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._releases: list[Callable[[], None]] = []

    @property
    def error(self) -> BaseException | None:
        """What made the save fail, or None."""
        return self._error

    def raise_if_failed(self) -> None:
        """Raises what made the save fail."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Nothing of this save will be published. The first error is kept; then whatever was held for the save is
        released, on this thread. Idempotent."""
        with self._changed:
            if self._error is not None:
                return
            self._error = error
            releases, self._releases = self._releases, []
            self._changed.notify_all()
        for release in releases:
            release()

    def when_failed(self, release: Callable[[], None]) -> None:
        """Have ``release``, which must not block, called once the save fails: at once where it has."""
        with self._changed:
            if self._error is None:
                self._releases.append(release)
                return
        release()

    def end(self) -> None:
        """The save is durable or failed: what would have to be released no longer has to be. Idempotent."""
        with self._changed:
            self._releases.clear()

    def notify(self) -> None:
        """Something that ``wait_until`` may be waiting for has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait_until(self, reached: Callable[[], bool], timeout_seconds: float, *, failed_too: bool = True) -> bool:
        """Block until ``reached()``, or, with ``failed_too``, until the save has failed, for at most so many seconds;
        what ``reached()`` says then. It is asked after each ``notify``."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not reached() and not (failed_too and self._error is not None):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
            return reached()
