"""Ranks go back to an earlier step together: what they acknowledged last is the newest, for all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT

import asyncckpt
from asyncckpt import KeepLast, Run


def _save(me: Me, path: str, steps: list[int], add: int, back_to: int | None) -> int:
    """Save ``steps``, first going back; the value that a new process then restores."""
    live = {"w": torch.zeros(4000, dtype=torch.int64), "loader": {"rank": me.rank}}
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT, keep=KeepLast(3)) as run:
        if back_to is not None:
            run.restore(live, step=back_to)
            assert live["w"].unique().tolist() == [back_to]
        for step in steps:
            live["w"].fill_(step + add)
            run.save(step, live).result(60)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        assert run.resume(live) == steps[-1]
    return int(live["w"].unique().item())


def test_ranks_that_go_back_together_save_over_the_branch_they_left(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    for steps, add, back_to in (([1, 2, 3, 4], 0, None), ([3], 100, 2), ([4, 5], 100, None)):
        outcomes = crews(2).run(_save, path, steps, add, back_to)
        assert [one.value for one in outcomes] == [steps[-1] + add] * 2, outcomes
    assert [entry.step for entry in Run(path).ls()] == [3, 4, 5]
    assert Run(path).load_tensors(4)["w.value"].unique().tolist() == [104]


def _restore_a_part(me: Me, path: str) -> None:
    """One rank restores all of its state and the other a part of its own: neither goes back."""
    part = {"w": torch.zeros(4000, dtype=torch.int64)}
    whole = part | {"loader": {"rank": me.rank}}
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.restore(whole if me.rank else part, step=1)
        run.save(2, whole).result(60)


def test_ranks_of_which_one_restores_a_part_go_nowhere(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    assert all(one.ok for one in crews(2).run(_save, path, [1, 2, 3], 0, None))
    assert [one.failed_with("StepExists") for one in crews(2).run(_restore_a_part, path)] == [True, True]


def _save_twice(me: Me, path: str) -> None:
    """Save step 2, and while that is in flight once more."""
    live = {"w": torch.zeros(4000, dtype=torch.int64), "loader": {"rank": me.rank}}
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        for value, step, again in ((1, 1, False), (2, 2, False), (102, 2, True), (3, 3, False)):
            live["w"].fill_(value)
            run.save(step, live, again=again)


def test_ranks_that_save_a_step_twice_have_what_they_saved_last(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    assert all(one.ok for one in crews(2).run(_save_twice, path))
    assert [entry.step for entry in Run(path).ls()] == [1, 2, 3]
    assert Run(path).load_tensors(2)["w.value"].unique().tolist() == [102]
