"""Checkpoints of a run that were found damaged."""

from __future__ import annotations

import threading


class Quarantine:
    """Names of damaged checkpoints: never counted by retention, never taken over from, and set aside when their step is
    saved again. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._names

    def add(self, name: str) -> None:
        """This one was found damaged."""
        with self._lock:
            self._names.add(name)

    def discard(self, name: str) -> None:
        """Nothing damaged bears this name any more."""
        with self._lock:
            self._names.discard(name)
