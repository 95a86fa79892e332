"""Lightning removes a checkpoint right after it has saved the one that takes its place. Here that one is still in
flight then, so the removal waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import AsyncCkptError
from asyncckpt.integrations.lightning.directory_run import KeepUntilRemoved
from asyncckpt.integrations.lightning.pointer import Pointer

log = logging.getLogger("asyncckpt")


class Removal:
    """Says that the file ``path`` is to be removed. ``pointer``: what it names, where that lies in a run that is not
    open; None for any other file. Thread-safe."""

    def __init__(self, path: Path, pointer: Pointer | None) -> None:
        self.path = path
        self._pointer = pointer
        self._lock = threading.Lock()

    def after(self, saves: Sequence[PendingSave], carry_out: Callable[[Removal], None]) -> None:
        """Call ``carry_out`` once all of ``saves`` are durable: at once where there are none, else on the thread of
        their callbacks. Where one fails, it is not called, and a warning says so."""
        if not saves:
            carry_out(self)
            return
        waiting = set(saves)

        def ended(save: PendingSave) -> None:
            with self._lock:
                waiting.discard(save)
                if waiting:
                    return
            if any(one.failed() for one in saves):
                log.warning("%s: it is not removed, because a save that was to take its place has failed", self.path)
                return
            carry_out(self)

        for save in saves:
            save.add_done_callback(ended)

    def delete_checkpoint(self) -> None:
        """Delete the checkpoint that the file has named from a run that is not open. Trouble is logged: it takes room,
        and nothing names it any more. Blocks on the disk."""
        if self._pointer is None:
            return
        policy = KeepUntilRemoved()
        policy.remove(self._pointer.name, frozenset())
        folder = self.path.parent / self._pointer.run
        try:
            checkpointer = Checkpointer(folder, ranks=None, keep=policy)
            try:
                checkpointer.prune()
            finally:
                checkpointer.close()
        except (AsyncCkptError, OSError) as error:
            log.warning("%s: the checkpoint that it named is left in %s: %s", self.path, folder, error)
