"""Preemption makes a signal end training with a save."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from asyncckpt import forks
from asyncckpt.errors import InvalidOption

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, slots=True)
class Preemption:
    """Says that a signal makes training save, then leave: ``Checkpointer(..., preemption=Preemption())``.

    After one of ``signals`` the next ``step`` saves, blocks until the checkpoint is durable, for at most
    ``deadline_seconds`` after the signal, and raises ``Preempted`` (a ``SystemExit``), so ``with`` blocks and
    ``finally`` run. What is not durable at the deadline is given up, an error is logged that says so, and ``Preempted``
    is raised all the same, without ``durable``. The exit code is ``exit_code``, or 128 + the signal's number where that
    is None: a scheduler sees that the job did not finish. A handler that was there before (of a launcher, or your own)
    is called too, at once; where it raises, training ends there, without a save. Raises ``InvalidOption`` for a
    deadline that is not above 0.
    """

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)
    deadline_seconds: float = 30.0
    exit_code: int | None = None

    def __post_init__(self) -> None:
        if not self.deadline_seconds > 0:
            raise InvalidOption(f"Preemption.deadline_seconds must be > 0, not {self.deadline_seconds!r}")


class Preempted(SystemExit):
    """``step`` raises this once the preemption save is durable, or its deadline has passed. ``step`` is the step that
    was to be saved, ``durable`` says whether it is, ``code`` is the exit code."""

    def __init__(self, code: int, step: int, *, durable: bool = True) -> None:
        super().__init__(code)
        self.step = step
        self.durable = durable


class SignalWatch:
    """Remembers that a signal came; it never saves inside the handler, where nothing is safe. A forked child gets the
    handlers back that were there before."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption
        self.received: signal.Signals | None = None
        self._deadline = 0.0
        if threading.current_thread() is not threading.main_thread():
            raise InvalidOption("preempt: signals can only be watched from a Checkpointer made on the main thread")
        self._pid = os.getpid()
        self._closed = False
        self._previous = {number: signal.signal(number, self._handle) for number in preemption.signals}
        forks.disarm_in_child(self)

    def mark_received(self) -> None:
        """Act as if this rank had been signalled now: another rank of the job was."""
        if self.received is None:
            self._handle(int(self.preemption.signals[0]), None)

    def remaining_seconds(self) -> float:
        """Return the seconds until the deadline; 0.0 where it has passed."""
        return max(0.0, self._deadline - time.monotonic())

    def exit_code(self) -> int:
        """Return the exit code that ``Preempted`` carries."""
        if self.preemption.exit_code is not None:
            return self.preemption.exit_code
        return 128 + int(self.received or 0)

    @property
    def name(self) -> str:
        """The name of the signal."""
        return self.received.name if self.received is not None else "preemption"

    def tell_of_lost(self, step: int, path: str) -> None:
        """Log that this step is not durable at the deadline."""
        log.error(
            "%s: step %d is not durable %.0f s after %s, and is given up; the checkpoints before it are intact. "
            "Leaving with exit code %d",
            path,
            step,
            self.preemption.deadline_seconds,
            self.name,
            self.exit_code(),
        )

    def close(self) -> None:
        """Put the handlers back that were there before, where ours are still in place. Where they are not, ours may
        still be called, by a handler that was put over it; then it only calls the one before it."""
        self._closed = True  # ``_handle`` and a forked child pass signals on then
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            while isinstance(watch := getattr(previous, "__self__", None), SignalWatch) and watch._closed:
                previous = watch._previous.get(number)
            if signal.getsignal(number) == self._handle and previous is not None:
                signal.signal(number, previous)

    def disarm(self) -> None:
        for number in self._previous:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, self._before(number))

    def _before(self, number: int) -> Any:
        """Return the handler that was there before any of this library's."""
        found: Any = self._previous.get(signal.Signals(number))
        while isinstance(watch := getattr(found, "__self__", None), SignalWatch):
            found = watch._previous.get(signal.Signals(number))
        return signal.SIG_DFL if found is None else found

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._closed or os.getpid() != self._pid:  # a handler that was installed over this one has called it
            before = self._previous.get(signal.Signals(number)) if self._closed else self._before(number)
            if callable(before):
                before(number, frame)
            elif before == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received is None:
            self._deadline = time.monotonic() + self.preemption.deadline_seconds
            self.received = signal.Signals(number)
        before = self._previous.get(signal.Signals(number))
        if frame is not None and callable(before) and before is not signal.default_int_handler:
            before(number, frame)
