"""In a job, rank 0 alone keeps the journal: one line a save, whatever the number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT

import asyncckpt


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
    assert [(entry.what, entry.step) for entry in entries] == [("save", 1), ("save", 2)]
    assert {entry.pid for entry in entries} == {pids[0]}
