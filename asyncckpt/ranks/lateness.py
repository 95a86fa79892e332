"""Whoever waits for other ranks says so within seconds: most often they have not made the call, and never will."""

from __future__ import annotations

import logging
from typing import Final

log = logging.getLogger("asyncckpt")

#: The first notice comes after so long: ranks that train together call within a step of each other.
_FIRST_SECONDS: Final = 5.0
#: Each further notice comes after so many times the wait before it.
_FACTOR: Final = 4.0
#: What takes each rank a time of its own, reading and writing: there the first notice comes later.
_UNEVEN: Final = ("call stage", "report its part")
_FIRST_UNEVEN_SECONDS: Final = 20.0


class LateNotice:
    """Logs, now and then, for whom a rank waits. ``operation``: what they have not done yet, after "did not"."""

    def __init__(self, operation: str, timeout_seconds: float) -> None:
        self._operation = operation
        self._timeout_seconds = timeout_seconds
        self._next_seconds = _FIRST_UNEVEN_SECONDS if operation.startswith(_UNEVEN) else _FIRST_SECONDS

    def look(self, waited_seconds: float, who: str) -> None:
        """Log that ``who`` is waited for, where it is time to. Never blocks."""
        if waited_seconds < self._next_seconds:
            return
        self._next_seconds = _FACTOR * waited_seconds
        log.warning(
            "%s did not %s yet, and has been waited for for %.0f s (RankLost after %.0f s). Every rank has to make the "
            "same calls of its Checkpointer: a save on rank 0 alone does not work, unless with ranks=None",
            who,
            self._operation,
            waited_seconds,
            self._timeout_seconds,
        )
