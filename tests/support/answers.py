"""A file system that answers what a test says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps


class Answering(InterceptedOps):
    """Answers an operation with an errno where ``when`` holds for its arguments; ``late``: after it was done."""

    def __init__(self, operation: str, code: int, when: Callable[..., bool] = lambda *_: True, *, late: bool = False):
        self.operation, self.code, self.when, self.late = operation, code, when, late
        self.answered = 0

    def _answer(self, name: str, args: tuple[Any, ...]) -> None:
        if name == self.operation and self.when(*args):
            self.answered += 1
            raise OSError(self.code, os.strerror(self.code), str(args[0]))

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.late:
            self._answer(name, args)
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if self.late:
            self._answer(name, args)


def empty_checkpoint(store: LocalStore, name: str = "step-00000001") -> Path:
    path = Path(store.path, name)
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    return path
