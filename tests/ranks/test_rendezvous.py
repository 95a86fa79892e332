"""Ranks that are started again meet in a store that still has the messages of those before them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.fault_points import state_of
from support.harness import Crews, Me

import asyncckpt
from asyncckpt.errors import PlanChanged, RankLost
from asyncckpt.ranks import rendezvous as meeting
from asyncckpt.ranks import store as distributed
from asyncckpt.ranks.connection import Connection, JobMessages
from asyncckpt.ranks.rendezvous import rendezvous


class _Messages:
    """A store in memory."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.check = self.store.check
        self.get = self.store.get
        self.get_many = self.store.multi_get
        self.set = self.store.set
        self.delete_key = self.store.delete_key


def _meeting(messages: _Messages, size: int, late: dict[int, float]) -> list[str]:
    def one(rank: int) -> str:
        time.sleep(late.get(rank, 0.0))
        return rendezvous(messages, rank, size, 20.0)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("late", [{}, {0: 0.2}, {2: 0.2}], ids=["all at once", "rank 0 late", "rank 2 late"])
def test_what_processes_before_left_is_not_believed(late: dict[int, float]) -> None:
    messages = _Messages()
    nonces = {"1": "stale", "2": "stale"}
    messages.set("all", json.dumps({"session": "before", "nonces": nonces}))
    for rank in (1, 2):
        messages.set(f"here/{rank}", "stale")
        messages.set(f"met/{rank}", "before/stale")
    sessions = _meeting(messages, 3, late)
    assert len(set(sessions)) == 1
    assert sessions[0] != "before"
    assert len(set(_meeting(messages, 3, {}) + sessions)) == 2, "each time has a name of its own"


def test_who_does_not_come_is_named() -> None:
    messages = _Messages()
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(rendezvous, messages, 1, 4, 20.0)
        with pytest.raises(RankLost, match=r"^rank 2, rank 3 did not begin within 1 s"):
            rendezvous(messages, 0, 4, 1.0)
        with pytest.raises(RankLost, match=r"^rank 2, rank 3 did not begin within 1 s"):
            there.result(20)


def test_a_rank_0_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_GRACE_SECONDS", 0.1)
    with pytest.raises(RankLost, match="rank 0 did not begin"):
        rendezvous(_Messages(), 1, 2, 0.1)


def _lives(me: Me, path: str) -> list[Any]:
    """As processes that torchrun starts twice, with one store: the first are gone before they close."""
    found: list[Any] = []
    for life in (1, 2):
        distributed._instances.clear()  # a process counts from the beginning
        run = asyncckpt.Checkpointer(
            path, ranks=asyncckpt.RankOptions(timeout_seconds=20), run=asyncckpt.RunOptions(takeover=life > 1)
        )
        found.append(run.resume(state_of(0)))
        for step in (3 * life - 2, 3 * life - 1):
            run.save(step, state_of(step)).result(40)
        dist.barrier()
        me.kept[f"life {life}"] = run  # never closed
    return found


def test_ranks_that_are_started_again_save_and_resume_together(crews: Crews, tmp_path: Path) -> None:
    assert crews(3).values(_lives, str(tmp_path / "run")) == [[0, 2]] * 3
    run = asyncckpt.Run(tmp_path / "run")
    assert [entry.step for entry in run.ls()] == [1, 2, 4, 5]
    assert all(run.verify(entry.step) == [] for entry in run.ls())


class _Overtaking:
    """A store where rank 0 answers, and goes on, between two looks of another rank."""

    def __init__(self, answers: bool) -> None:
        self._messages = _Messages()
        self._answers = answers
        self.get, self.set, self.delete_key = self._messages.get, self._messages.set, self._messages.delete_key

    def check(self, keys: list[str]) -> bool:
        if keys == ["went on"]:
            if self._answers:
                self.set("plan/all", distributed._packed({"bodies": ["of 0", "of 1"]}))
            self.set("went on", b"")
        return bool(self._messages.check(keys))


def _second_of_two(store: _Overtaking) -> distributed.RankStore:
    messages = JobMessages(Connection(store), "", 5)
    return distributed.RankStore(messages, 1, 2, asyncckpt.RankOptions(timeout_seconds=5))


def test_an_answer_counts_also_where_rank_0_has_gone_on_since() -> None:
    ranks = _second_of_two(_Overtaking(True))
    assert ranks.agree("plan", "of 1", key="plan", cancel_key="went on") == ["of 0", "of 1"]
    alone = _second_of_two(_Overtaking(False))
    with pytest.raises(PlanChanged, match="on this rank alone"):
        alone.agree("plan", "of 1", key="plan", cancel_key="went on")
