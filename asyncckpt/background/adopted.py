"""The run of a trainer that is gone, which the background process holds until what was left to it is published."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

from asyncckpt.background.messages import PassedLease
from asyncckpt.catalog.newest import LATEST
from asyncckpt.errors import AsyncCkptError
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.records import Manifest
from asyncckpt.storage.lease import Lease
from asyncckpt.storage.local import LocalStore

log = logging.getLogger("asyncckpt")


class AdoptedRun:
    """Holds the lock of a run with the trainer, whose descriptor ``lock`` is, and without it once that is gone. For the
    committer's thread, and the main one while that has nothing to do."""

    def __init__(self, store: LocalStore, passed: PassedLease, lock: int) -> None:
        self._store = store
        self._passed = passed
        self._lock = lock
        self._lease: Lease | None = None

    def go_on(self) -> None:
        """Become the run's writer in place of the trainer. Blocks on the storage. Where another run has the directory
        by now, this becomes known before the first save is published."""
        with contextlib.suppress(AsyncCkptError, OSError):
            self._lease = Lease.adopt(self._passed.directory, self._lock, self._passed.owner, self._passed.options)

    def before_publish(self, contents: Contents, replaces: Sequence[str]) -> None:
        """Make sure that the run is still held, and have those checkpoints make way whose place this one takes. Raises
        ``LeaseLost``."""
        if self._lease is None:
            self._lease = Lease.adopt(self._passed.directory, self._lock, self._passed.owner, self._passed.options)
        self._lease.check()
        for name in replaces:
            self._store.make_way(name, contents.draft.attempt)

    def published(self, written: Manifest) -> None:
        """Tidy up after a checkpoint that is durable, as far as the next run does not. Blocks on the storage."""
        if written.kind == "full":
            try:
                self._store.put(LATEST, f"{written.name}\n".encode(), replace=True)
            except OSError as error:
                log.warning("step %d is durable, but %s was not written: %s", written.step, LATEST, error)

    def give_back(self) -> None:
        """Give the run back, for the next one to begin. Blocks for seconds at most."""
        if self._lease is not None:
            self._lease.release()
        else:
            with contextlib.suppress(OSError):
                os.close(self._lock)
