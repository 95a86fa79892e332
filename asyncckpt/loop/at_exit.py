"""A checkpointer that nobody closes is closed at exit: a script that ends must not lose an unfinished save silently."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from typing import Protocol

log = logging.getLogger("asyncckpt")


class Drainable(Protocol):
    """Has saves that may be unfinished when the interpreter ends."""

    path: str

    def unfinished(self) -> int: ...

    def close(self) -> None: ...


def drain_at_exit(target: Drainable) -> None:
    """Close ``target`` when the interpreter ends, if it still lives, and say so where saves were unfinished.

    ``threading._register_atexit`` runs while threads and executors still work. Plain ``atexit`` comes too late to write
    anything; it is the fallback, so that the loss is at least reported. A forked child ends in the same way, and has
    nothing to wait for.
    """
    reference = weakref.ref(target)
    pid = os.getpid()

    def drain() -> None:
        alive = reference() if os.getpid() == pid else None
        if alive is None:
            return
        count = alive.unfinished()
        if count:
            log.warning("%s: leaving with %d saves not durable yet; finishing them (use `with`)", alive.path, count)
        try:
            alive.close()
        except Exception as error:
            log.error("%s: a save failed: %s", alive.path, error)

    register = getattr(threading, "_register_atexit", atexit.register)
    register(drain)
