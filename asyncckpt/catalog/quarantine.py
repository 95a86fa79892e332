"""The quarantine remembers which checkpoints of a run were found damaged."""

from __future__ import annotations

import threading


class Quarantine:
    """Holds the names of damaged checkpoints. Retention never counts them, no file is taken over from them, and they
    are set aside when their step is saved again. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._names

    def names(self) -> list[str]:
        """Return the names, in no order."""
        with self._lock:
            return list(self._names)

    def add(self, name: str) -> None:
        """Note that the checkpoint of this name was found damaged."""
        with self._lock:
            self._names.add(name)

    def discard(self, name: str) -> None:
        """Note that nothing damaged has this name any more."""
        with self._lock:
            self._names.discard(name)
