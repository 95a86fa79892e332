"""What makes a checkpoint of others is struck at every call to the disk that changes something."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncckpt import AsyncCkptError, Run
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps
from asyncckpt.testing.interception import READING


class Gone(BaseException):
    """The process has ended here: whatever it would still do, the disk does not learn of."""


class StruckOps(InterceptedOps):
    """At call ``number`` (from 1) of those that change something, answers with EIO, or, ``dies``, with nothing any
    more: every later call that would change something raises ``Gone``."""

    def __init__(self, number: int, *, dies: bool) -> None:
        self.left = number
        self.dies = dies
        self.struck = False
        self._lock = threading.Lock()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in READING or name in ("close", "close_read"):
            return args
        with self._lock:
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.dies):
                self.struck = True
                raise Gone if self.dies else OSError(errno.EIO, "Input/output error")
        return args


def _close_all(path: Path) -> None:
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(f"{path}/"):
                os.close(number)


def strike_everywhere(make: Callable[[Path], Path], act: Callable[[LocalStore], object], *, dies: bool) -> int:
    """Call ``act`` on a new run that ``make`` makes in a place of its own, struck at the first call, the second, and so
    on, until it comes to its end; return how often it was struck. After each, every visible checkpoint verifies."""
    number = 0
    while True:
        number += 1
        path = make(Path(f"{number}-{dies}"))
        ops = StruckOps(number, dies=dies)
        try:
            act(LocalStore(str(path), ops=ops))
        except (Gone, AsyncCkptError):
            assert ops.struck
        if dies:
            _close_all(path)  # as the end of a process does
        run = Run(path)
        for entry in run.ls():
            assert entry.damage is None, (number, entry)
            assert run.verify_entry(entry) == [], (number, entry)
        if not ops.struck:
            return number - 1
