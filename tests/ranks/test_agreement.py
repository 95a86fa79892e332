"""Ranks that do not save the same thing: a typed error on every one of them, naming the odd one. What they settle."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import Crew, Crews, Me
from support.options import by_stage
from support.parallelisms import TIMEOUT

import asyncckpt
from asyncckpt.ranks.announcements import LEAD_STEPS

SHORT = asyncckpt.RankOptions(timeout_seconds=1.5)


def _outcome(call: Any) -> tuple[str, str]:
    """Class and message of what a save ends with."""
    try:
        error = call().exception(30)
    except asyncckpt.AsyncCkptError as raised:
        error = raised
    return type(error).__name__, str(error)


def _state(**tensors: torch.Tensor) -> dict[str, Any]:
    return {"w": torch.ones(300_000), **tensors}


def _disagree(me: Me, path: str, how: str) -> list[tuple[str, str]]:
    """Save step 1 alike, then something that is not alike on rank 1, then step 9 alike."""
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, check_replicas=how == "replicas")) as run:
        run.save(1, _state()).result(30)
        odd = me.rank == 1
        step, state = 2, _state()
        if how == "steps" and odd:
            step = 3
        elif how == "names" and odd:
            state = _state(more=torch.ones(5))
        elif how == "shapes" and odd:
            state = {"w": torch.ones(300_001)}
        elif how == "replicas" and odd:
            state["w"][77] = 2.0
        found = [_outcome(lambda: run.save(step, state))]
        found.append(_outcome(lambda: run.save(9, _state())))
    return found


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("steps", "RanksDisagree", "rank 1 saves step 3"),
        ("names", "PlanChanged", "[1]"),
        ("shapes", "PlanChanged", "[1]"),
        ("replicas", "RanksDisagree", "w.value on ranks [1]"),
    ],
)
def test_the_odd_rank_is_named_on_every_rank(how: str, kind: str, message: str, crews: Crews, tmp_path: Path) -> None:
    found = crews(3).values(_disagree, str(tmp_path / "run"), how)
    seen = [first for first, _ in found]
    assert {name for name, _ in seen} == {kind}, seen
    # on the odd one itself, a changed plan is news of its own: it says "on this rank alone"
    named = [text for rank, (_, text) in enumerate(seen) if not (kind == "PlanChanged" and rank == 1)]
    assert all(message in text for text in named), seen
    assert [last for _, last in found] == [("NoneType", "None")] * 3, "the ranks cannot save any more"
    steps = [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()]
    assert steps == [1, 9]
    assert asyncckpt.Run(tmp_path / "run").verify() == []


def _first_save(me: Me, path: str, how: str) -> tuple[str, str]:
    state: dict[str, Any] = {"w": torch.ones(5)}
    if how == "kinds" and me.rank == 2:
        state = {"w": torch.nn.Linear(2, 2)}
    if how == "shapes" and me.rank == 2:
        state = {"w": torch.ones(6)}
    run = asyncckpt.Checkpointer(path, ranks=SHORT if how == "missing call" else TIMEOUT)
    if how == "missing call" and me.rank == 2:
        return "RankLost", "rank 2"
    found = _outcome(lambda: run.save(1, state))
    with contextlib.suppress(asyncckpt.AsyncCkptError):
        run.close()
    return found


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("kinds", "RanksDisagree", "on rank 2"),
        ("shapes", "RanksDisagree", "on rank 2"),
        ("missing call", "RankLost", "rank 2"),
    ],
)
def test_what_cannot_be_one_checkpoint_is_refused_when_it_is_planned(
    how: str, kind: str, message: str, crews: Crews, tmp_path: Path
) -> None:
    found = crews(3).values(_first_save, str(tmp_path / "run"), how)
    assert all(name == kind and message in text for name, text in found), found
    assert asyncckpt.Run(tmp_path / "run").ls() == []


# -- what is the same everywhere, what is each rank's own ------------------------------------------------------------


class _Counter:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "table": torch.full((9,), self.value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        assert state["table"].tolist() == [self.value] * 9


def _own_and_replicated(me: Me, path: str) -> tuple[int, int]:
    own, alike = _Counter(10 + me.rank), _Counter(5)
    state = {"w": torch.ones(5), "own": own, "alike": asyncckpt.Replicated(alike), "plain": {"same": 1}}
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, state).result(30)
        own.value = alike.value = -1
        run.restore(state)
    return own.value, alike.value


def test_replicated_is_stored_once_and_everything_else_of_ones_own_by_rank(crews: Crews, tmp_path: Path) -> None:
    found = crews(3).values(_own_and_replicated, str(tmp_path / "run"))
    assert found == [(10, 5), (11, 5), (12, 5)]
    manifest = json.loads((tmp_path / "run" / "step-00000001" / "manifest.json").read_text())
    assert sorted(manifest["components"]) == ["alike", "own", "own+1", "own+2", "plain", "w"]


# -- when --------------------------------------------------------------------------------------------------------------


class _FakeTime:
    """A clock that each rank reads differently."""

    def __init__(self, rank: int) -> None:
        self.now = 1000.0 * rank

    def __call__(self) -> float:
        return self.now


def _train_by(me: Me, path: str, every: Any) -> list[int]:
    """Steps saved by 12 steps of 30 seconds each; rank 2's clock runs at half the speed."""
    from asyncckpt.loop import triggers as occasions

    clock = _FakeTime(me.rank)
    real, occasions.time = occasions.time, type("time", (), {"monotonic": staticmethod(clock)})  # type: ignore[assignment]
    try:
        saved: list[int] = []
        with asyncckpt.Checkpointer(path, every=every, ranks=TIMEOUT) as run:
            for step in range(1, 13):
                clock.now += 15.0 if me.rank == 2 else 30.0
                if (pending := run.step(step, {"w": torch.full((5,), step)})) is not None:
                    pending.result(30)
                    saved.append(step)
                dist.barrier()  # as training would
    finally:
        occasions.time = real
    return saved


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (asyncckpt.Steps(4), [4, 8, 12]),
        # due on rank 0's clock after 4 steps of 30 s, announced LEAD_STEPS ahead
        (asyncckpt.Minutes(2), [4 + LEAD_STEPS, 4 + LEAD_STEPS + 4 + LEAD_STEPS]),
        ([asyncckpt.Steps(5), asyncckpt.Minutes(60)], [5, 10]),
    ],
    ids=["steps", "minutes", "both"],
)
def test_all_ranks_save_the_same_steps_whatever_their_clocks_say(
    every: Any, expected: list[int], crews: Crews, tmp_path: Path
) -> None:
    assert crews(3).values(_train_by, str(tmp_path / "run"), every) == [expected] * 3


def test_the_store_may_be_a_file(crews: Crews, tmp_path: Path) -> None:
    (tmp_path / "rendezvous").mkdir()
    crews.leave_room(3)
    with Crew(3, store="file", folder=str(tmp_path / "rendezvous")) as crew:
        found = crew.values(_disagree, str(tmp_path / "run"), "nothing")
    assert found == [[("NoneType", "None")] * 2] * 3
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [1, 2, 9]


def _retention(me: Me, path: str) -> list[int]:
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT, keep=()) as run:
        for step in (1, 2, 3):
            run.save(step, _state()).result(30)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT, keep=asyncckpt.KeepLast(1)) as run:
        run.resume(_state())
        deleted = run.prune()
        dist.barrier()
        return [entry.step for entry in deleted]


def test_rank_0_alone_deletes(crews: Crews, tmp_path: Path) -> None:
    assert crews(2).values(_retention, str(tmp_path / "run")) == [[1, 2], []]
