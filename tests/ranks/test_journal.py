"""In a job, rank 0 alone keeps the journal: what a save was, and which ranks were slow, however many there are."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT

import asyncckpt
from asyncckpt.storage.posix import PosixOps


def _saves(me: Me, path: str) -> int:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **SIZES)) as run:
        state = {"w": torch.full((900, 70), 1.0)}
        run.resume(state)
        for step in (1, 2):
            run.save(step, state).result(60)
    return os.getpid()


def test_rank_0_writes_one_line_for_what_all_ranks_did(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    pids = crews(3).values(_saves, path)
    entries = asyncckpt.Run(path).journal()
    assert [(entry.what, entry.step) for entry in entries] == [("ranks", 1), ("save", 1), ("ranks", 2), ("save", 2)]
    assert {entry.pid for entry in entries} == {pids[0]}


LATE_SECONDS = 2.0


class _Slow(PosixOps):
    """Takes half a second to make a file durable."""

    def fsync(self, fd: int) -> None:
        time.sleep(0.5)
        super().fsync(fd)


def _uneven(me: Me, path: str) -> float:
    """Rank 1 comes late to the second save, and rank 2 has a slow disk in the third. Return how long rank 0's training
    was held by its calls for the second one."""
    held = 0.0
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **SIZES)) as run:
        state = {"w": torch.full((1200, 1000), 1.0)}
        run.save(1, state).result(60)
        dist.barrier()
        if me.rank == 1:
            time.sleep(LATE_SECONDS)
        began = time.perf_counter()
        pending = run.save(2, state)
        for step in range(3, 13):
            run.step(step, state)
        held = time.perf_counter() - began
        pending.result(60)
        if me.rank == 2:
            run._store.ops = _Slow()
        state["w"] += 1
        run.save(20, state).result(60)
    return held


def test_it_says_which_rank_was_late_and_which_slow_and_training_waits_for_neither(
    crews: Crews, tmp_path: Path
) -> None:
    path = str(tmp_path / "run")
    held = crews(3).values(_uneven, path)
    lines = {entry.step: entry.fields for entry in asyncckpt.Run(path).journal() if entry.what == "ranks"}
    late: Any = lines[2]
    assert late["ranks"] == 3
    assert late["last_rank"] == 1
    assert LATE_SECONDS / 2 < late["waited_seconds"] < 3 * LATE_SECONDS
    assert late["slowest"]["write"][1] < LATE_SECONDS / 2, "no rank took long: one came late"
    assert max(held[0], held[2]) < LATE_SECONDS / 2, "training waited for the late rank"
    slow: Any = lines[20]["slowest"]
    rank, seconds, median = slow["write"]
    assert rank == 2
    assert seconds >= 0.5 > median
    assert slow["stage"][1] < 0.5
