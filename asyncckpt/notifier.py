"""Whoever asked to be told of something is told on a thread of its own, which nothing in a save waits for."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from asyncckpt import interrupts

log = logging.getLogger("asyncckpt")

#: After so long, whoever waits for the functions of others says which one it waits for.
_SLOW_SECONDS: Final = 10.0


class Notifier:
    """Calls functions, one after the other, in the order in which they were posted, on one thread of its own. So they
    may block, and may call anything of this library. Thread-safe. In a forked child it does nothing."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._queue: deque[tuple[str, Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = ""
        self._closed = False

    def post(self, what: str, call: Callable[[], object], *, soon: bool = True) -> None:
        """Have ``call()`` called; what it raises is logged, with ``what``. Never blocks. Without ``soon`` it may wait
        for the next post: of what comes by the hundred, each would wake the thread, which takes the interpreter from
        training. After ``close`` it is called at once, on this thread."""
        if os.getpid() != self._pid:
            return
        with interrupts.deferred(), self._changed:
            closed = self._closed
            if not closed:
                self._queue.append((what, call))
                if soon and self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="asyncckpt-notifier", daemon=True)
                    self._thread.start()
                if soon:
                    self._changed.notify_all()
        if closed:
            _call(what, call)

    def on_own_thread(self) -> bool:
        """Whether the caller is one of the functions that were posted, or is called by one."""
        return threading.current_thread() is self._thread

    def drain(self, timeout_seconds: float) -> bool:
        """Block until everything posted so far has been called; False where ``timeout_seconds`` passed first. Logs what
        it waits for where that takes long. Returns at once on the notifier's own thread."""
        if self.on_own_thread() or os.getpid() != self._pid:
            return True
        done = threading.Event()
        with self._changed:
            if not self._queue and not self._running:
                return True
        self.post("the end", done.set)
        began = time.monotonic()
        if interrupts.wait_for(done.wait, min(_SLOW_SECONDS, timeout_seconds)):
            return True
        if timeout_seconds > _SLOW_SECONDS:
            log.warning("waiting for %s to return, for at most %.0f s more", self._running, timeout_seconds)
            if interrupts.wait_for(done.wait, began + timeout_seconds - time.monotonic()):
                return True
        log.warning("%s has not returned; what it still does may be cut off", self._running or "a callback")
        return False

    def close(self) -> None:
        """End the thread once it has called what was posted. Does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = ""
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                self._running, call = self._queue.popleft()
            _call(self._running, call)
            del call


def _call(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException:  # ``SystemExit`` on this thread would end it, and keep what comes next from the others
        log.exception("%s raised", what)
