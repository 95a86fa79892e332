"""What tests of committing share: a small state and a checkpointer with given operations."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from asyncckpt import Checkpointer
from asyncckpt.storage.posix import PosixOps
from support.options import by_stage

STATE = {"w": torch.arange(300_000, dtype=torch.float32)}


def drain(run: Checkpointer) -> None:
    """Until the committer has tidied up behind what it acknowledged."""
    done = threading.Event()
    run._committer._pool.submit(done.set)
    assert done.wait(30)


def checkpointer(path: Path, ops: PosixOps, **options: Any) -> Checkpointer:
    """One whose first step is saved before the operations are those given."""
    run = Checkpointer(path / "run", **by_stage(incremental=False, **options))
    run.save(1, STATE).result()
    drain(run)  # the hint goes after the acknowledgement
    run._store.ops = ops
    return run
