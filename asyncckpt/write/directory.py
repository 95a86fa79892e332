"""The directory that one save is written to before it is published."""

from __future__ import annotations

import contextlib
import threading
import time

from asyncckpt.protocols import PendingDirectory, SpaceReserver, Store
from asyncckpt.scope import SaveScope
from asyncckpt.write.unchanged import Unchanged

#: What a checkpoint needs on disk beyond its tensors, for the space estimate.
_SMALL_FILES_BYTES = 4 << 20
_LOOK_SECONDS = 0.02


class SaveDirectory:
    """Makes the directory of a save when a thread first needs it, once there is room for the save. Thread-safe.

    ``name``: the checkpoint's. ``attempt``: the attempt's uuid. ``shared``: several ranks write into it.
    ``beside_bytes``: what else is going to be written into it.
    """

    def __init__(
        self,
        store: Store,
        scope: SaveScope,
        space: SpaceReserver,
        unchanged: Unchanged,
        *,
        name: str,
        attempt: str,
        shared: bool,
        beside_bytes: int,
    ) -> None:
        self._store = store
        self._scope = scope
        self._space = space
        self._unchanged = unchanged
        self._name = name
        self._uuid = attempt
        self._shared = shared
        self._beside_bytes = _SMALL_FILES_BYTES + beside_bytes
        self._lock = threading.Lock()
        self._made: PendingDirectory | None = None

    @property
    def path(self) -> str:
        """The directory's path; before it is made, that of the run."""
        return self._made.path if self._made is not None else self._store.address

    @property
    def run(self) -> str:
        """The run's address."""
        return self._store.address

    def run_is_gone(self, patience_seconds: float) -> bool:
        """Whether the run's own record of who holds it is not there any more, or goes within so many seconds. Blocks on
        the disk."""
        give_up = time.monotonic() + patience_seconds
        while True:
            with contextlib.suppress(OSError):
                if self._store.holder() is None:
                    return True
            if time.monotonic() >= give_up:
                return False
            time.sleep(_LOOK_SECONDS)

    def open(self) -> PendingDirectory:
        """Return the directory, and make it the first time. Blocks on the disk. Raises ``NotEnoughSpace``, and what
        made the save fail."""
        with self._lock:
            if self._made is None:
                self._scope.raise_if_failed()
                self._space.make_room(self._unchanged.expected_bytes() + self._beside_bytes, self._scope.step)
                self._made = self._store.begin(self._scope.step, self._uuid, name=self._name, shared=self._shared)
            return self._made

    def discard(self, timeout_seconds: float, *, keep: bool) -> bool:
        """Remove the directory with all that is in it, or, with ``keep``, only close its files. Call it only for a save
        that has failed and has no write in the kernel any more. Returns False where another thread is still making the
        directory after ``timeout_seconds``."""
        if not self._lock.acquire(timeout=max(0.0, timeout_seconds)):
            return False
        directory = self._made  # nobody can create files from here on: the save has failed
        self._lock.release()
        if directory is not None and keep:
            directory.close()
        elif directory is not None:
            directory.discard()
        return True
