"""What the background process reports goes to the trainer in batches: each message wakes a thread there."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

from asyncckpt.background.mapped import UnitName
from asyncckpt.background.wire import Channel
from asyncckpt.events import Event, ExtentWritten

#: So long the memory of units that are written, and their events, wait for others.
_BATCH_SECONDS = 0.02


class Reports:
    """Sends reports over a channel. Thread-safe. Where the trainer is gone, they are dropped."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._units: list[UnitName] = []
        self._events: list[dict[str, Any]] = []
        threading.Thread(target=self._run, name="asyncckpt-reports", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, after all that waits. Blocks where the trainer takes nothing."""
        with contextlib.suppress(OSError):
            self.flush()
            self._channel.send_json(message)

    def written(self, unit: UnitName) -> None:
        """Report that the memory of a unit is free, soon."""
        with self._lock:
            self._units.append(unit)
        self._due.set()

    def happened(self, event: Event) -> None:
        """Report an event: one of an extent soon, any other now."""
        fields = {name: getattr(event, name) for name in ("step", "at_seconds", "thread", "nbytes", "seconds")}
        with self._lock:
            self._events.append({"class": type(event).__name__, **fields})
        if not isinstance(event, ExtentWritten):
            with contextlib.suppress(OSError):
                self.flush()

    def flush(self) -> None:
        """Send what waits. Raises ``OSError`` where the trainer is gone."""
        with self._lock:
            units, self._units = self._units, []
            events, self._events = self._events, []
        if units or events:
            self._channel.send_json({"about": "progress", "units": units, "events": events})

    def _run(self) -> None:
        gone = threading.Event()
        while True:
            self._due.wait()
            gone.wait(_BATCH_SECONDS)
            self._due.clear()
            with contextlib.suppress(OSError):
                self.flush()


class LogHandler(logging.Handler):
    """Sends the lines that this process logs to the trainer, which logs them."""

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        self._reports.send({"about": "log", "level": record.levelno, "text": self.format(record)})
