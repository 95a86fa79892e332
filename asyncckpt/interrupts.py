"""Signal handlers wait while the training thread is inside this library, so that an exception of theirs breaks nothing.

Python runs signal handlers between any two instructions of the main thread, and most of them raise: Ctrl-C becomes
``KeyboardInterrupt``, SIGTERM often ``SystemExit``. Raised at the wrong instant, that leaves a lock held or a step
reserved for ever. So inside ``deferred`` a handler is only noted. It runs when the call ends, or where the call waits
for something: every such wait calls ``deliver`` each ``SLICE_SECONDS``, at a place where an exception does no harm.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

#: A wait looks so often whether a signal came.
SLICE_SECONDS: Final = 0.05
#: A signal that comes again after this long is somebody who will not wait any more: its handler runs at once.
IMPATIENCE_SECONDS: Final = 1.0


#: The public module's functions look every handler up in an enumeration, which takes a save tens of microseconds.
_signal: Any = importlib.import_module("_signal")

_Handler = Callable[[int, FrameType | None], Any]
#: These are the signals that programs and schedulers use to end or to steer a program.
_NUMBERS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGCONT")
    if hasattr(signal, name)
)


class _Deferral:
    """Keeps the handlers that were replaced, and the signals that came meanwhile. For the main thread."""

    def __init__(self) -> None:
        self._depth = 0
        self._handlers: dict[int, _Handler] = {}
        self.came: list[tuple[int, FrameType | None, _Handler]] = []
        self._since_seconds: dict[int, float] = {}

    def begin(self) -> None:
        if not self._depth:
            for number in _NUMBERS:
                handler = _signal.getsignal(number)
                if callable(handler) and handler != self.handle:
                    self._handlers[number] = handler
                    _signal.signal(number, self.handle)
        self._depth += 1  # last of all: until here a handler may raise, and then there is no ``end``

    def end(self) -> None:
        """Put the handlers back, and run those whose signal came. Raises what they raise."""
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            for number, handler in list(self._handlers.items()):
                if _signal.getsignal(number) == self.handle:  # a handler may have installed another one
                    _signal.signal(number, handler)
                del self._handlers[number]
        finally:  # a handler may raise as soon as it is back; ours, where it stays in place, then calls the other
            self._depth = 0
            self.deliver()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; run its handler at once where nothing is deferred, or where the sender insists."""
        handler = self._handlers[number]
        now = time.monotonic()
        insists = now - self._since_seconds.setdefault(number, now) > IMPATIENCE_SECONDS
        if self._depth and not insists:
            if all(number != known for known, _, _ in self.came):
                self.came.append((number, frame, handler))
            return
        self._since_seconds.pop(number, None)
        self.came = [one for one in self.came if one[0] != number]
        handler(number, frame)

    def deliver(self) -> None:
        """Run the handlers of the signals that came, each once. Raises what they raise."""
        if self.came:
            number, frame, handler = self.came.pop(0)
            self._since_seconds.pop(number, None)
            try:
                handler(number, frame)
            finally:
                self.deliver()

    def forget(self) -> None:
        """Forget what came for the parent of a forked child."""
        self.came.clear()
        self._since_seconds.clear()


_deferral = _Deferral()


os.register_at_fork(after_in_child=_deferral.forget)


def _on_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let the handlers of signals that come during the body run at its end, or in ``deliver``; what they raise is
    raised from here. Can be nested. Does nothing on threads other than the main one, where no handler ever runs."""
    if not _on_main_thread():
        yield
        return
    _deferral.begin()
    try:
        yield
    finally:
        _deferral.end()


def deliver() -> None:
    """Run the handlers of signals that came inside ``deferred``, now. Call it where the main thread waits, with no lock
    held, and at a place where whatever they raise leaves everything whole. Does nothing on other threads."""
    if pending():
        _deferral.deliver()


def pending() -> bool:
    """Whether the main thread asks, and ``deliver`` would run a handler. Never blocks."""
    return bool(_deferral.came) and _on_main_thread()


def slice_of(seconds: float | None) -> float | None:
    """Return how long to block at once in a wait of ``seconds`` (None: without end): on the main thread a short time,
    so that it can ``deliver`` in between."""
    if not _on_main_thread():
        return seconds
    return SLICE_SECONDS if seconds is None else min(seconds, SLICE_SECONDS)


def wait_for(wait: Callable[[float], bool], timeout_seconds: float | None) -> bool:
    """Call ``wait(seconds)`` with short times until it returns true, for at most ``timeout_seconds`` (None: without
    end), and ``deliver`` between two calls. Returns whether it did. ``wait`` must hold no lock once it returns."""
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        remaining = SLICE_SECONDS if deadline is None else deadline - time.monotonic()
        if wait(max(0.0, min(SLICE_SECONDS, remaining))):
            return True
        deliver()
        if remaining <= 0:
            return False
