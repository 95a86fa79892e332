"""Preemption makes a signal end training with a save."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from asyncckpt import forks
from asyncckpt.errors import InvalidOption


@dataclass(frozen=True, slots=True)
class Preemption:
    """Says that a signal makes training save, then leave: ``Checkpointer(..., preemption=Preemption())``.

    After one of ``signals`` the next ``step`` saves, blocks until the checkpoint is durable, for at most
    ``deadline_seconds`` after the signal, and raises ``Preempted`` (a ``SystemExit``), so ``with`` blocks and
    ``finally`` run. The exit code is ``exit_code``, or 128 + the signal's number where that is None: a scheduler sees
    that the job did not finish. Raises ``InvalidOption`` for a deadline that is not above 0.
    """

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)
    deadline_seconds: float = 30.0
    exit_code: int | None = None

    def __post_init__(self) -> None:
        if not self.deadline_seconds > 0:
            raise InvalidOption(f"Preemption.deadline_seconds must be > 0, not {self.deadline_seconds!r}")


class Preempted(SystemExit):
    """``step`` raises this once the preemption save is durable. ``step`` is the saved step, ``code`` the exit code."""

    def __init__(self, code: int, step: int) -> None:
        super().__init__(code)
        self.step = step


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

    def close(self) -> None:
        """Put the previous handlers back, where ours are still in place."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle and threading.current_thread() is threading.main_thread():
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
        if os.getpid() != self._pid:  # the handler that a forked child installed has called this one
            before = self._before(number)
            if callable(before):
                before(number, frame)
            elif before == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received is None:
            self._deadline = time.monotonic() + self.preemption.deadline_seconds
            self.received = signal.Signals(number)
