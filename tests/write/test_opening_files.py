"""A shard's file is made once, by whichever thread comes first."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import torch

from asyncckpt import Checkpointer, RunOptions, Safetensors, WriterOptions
from asyncckpt.errors import NotEnoughSpace
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps


class _Full(InterceptedOps):
    """A disk that has room for a name and for no block; the first to learn that takes its time to say so."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.learnt = threading.Event()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "open" and str(args[0]).endswith(".safetensors"):
            self.made.append(str(args[0]))
        if name == "reserve":
            time.sleep(0.3)  # the other threads come to the same file
            raise OSError(errno.ENOSPC, "No space left on device")
        return args


def test_a_file_that_could_not_be_made_is_not_tried_again_by_another_thread(tmp_path: Path) -> None:
    """It would find the first one's name there, and that is not what was wrong."""
    ops = _Full()
    run = RunOptions(store=LocalStore(str(tmp_path / "run"), ops=ops))
    files, writer = Safetensors(extent_bytes=256 << 10), WriterOptions(threads=4)
    with Checkpointer(tmp_path / "run", files=files, writer=writer, run=run) as saving:
        error = saving.save(1, {"w": torch.ones(1 << 20)}).exception(60)
    assert isinstance(error, NotEnoughSpace), repr(error)
    assert len(ops.made) == 1
