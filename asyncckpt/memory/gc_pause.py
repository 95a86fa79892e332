"""Garbage collection held back while much is allocated that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back() -> Iterator[None]:
    """No automatic garbage collection meanwhile. Planning a restore allocates many objects and no garbage, and in a
    process with torch in it every look of the collector at all that lives takes some 150 ms, of all threads. What
    somebody else switched off stays off."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
