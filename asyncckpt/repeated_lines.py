"""The log says each thing a few times, not at every step: lines that differ in numbers alone are counted instead."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Final

#: So many lines that say the same are logged within ``WINDOW_SECONDS``.
MOST_LINES: Final = 5
WINDOW_SECONDS: Final = 60.0
#: The most different lines that are remembered.
_MOST_KINDS: Final = 256
_NUMBER = re.compile(r"\d+(\.\d+)?")


class RepeatedLines(logging.Filter):
    """Holds warnings and errors back that repeat what was logged, and adds their count to the next that is not held
    back. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._known: dict[tuple[int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        kind = record.levelno, _NUMBER.sub("#", text)
        now = time.monotonic()
        with self._lock:
            began, count = self._known.pop(kind, (now, 0))
            held_back = max(0, count - MOST_LINES)
            if now - began >= WINDOW_SECONDS:
                began, count = now, 0
            self._known[kind] = began, count + 1
            if len(self._known) > _MOST_KINDS:
                del self._known[next(iter(self._known))]
        if count == 0 and held_back:
            record.msg, record.args = f"{text} ({held_back} more such lines since)", ()
        return count < MOST_LINES


def hold_back_repeated(logger: logging.Logger) -> None:
    """Hold back the repeated lines of ``logger``. Idempotent."""
    if not any(isinstance(one, RepeatedLines) for one in logger.filters):
        logger.addFilter(RepeatedLines())
