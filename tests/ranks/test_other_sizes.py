"""A job of another size goes on: what a rank gets that the checkpoint has no state of, and what it is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from torch import nn

import asyncckpt
from asyncckpt.events import Event, RanksChanged


class _Reader:
    """Stands in for a data loader: where this rank is in its share of the data."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "seen": torch.full((3,), self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = int(state["seen"].sum()) // 3
        assert state["at"] == self.at


def _sum_of_all(states: list[Any], rank: int, size: int) -> Any:
    at = sum(state["at"] for state in states) + 1000 * rank + size
    return {"at": at, "seen": torch.full((3,), at)}


def _state(me: Me, shuffle: random.Random, *, ruled: bool = True) -> dict[str, Any]:
    """Everything that a rank may have of its own; ``shuffle`` draws the same on all ranks."""
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reader = _Reader(10 * (me.rank + 1))
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "rng": asyncckpt.RngState({"shuffle": shuffle, "noise": np.random.default_rng(me.rank)}),
        "epoch": {"n": 4},
        "alike": asyncckpt.Replicated(_Reader(7)),
        "reader": asyncckpt.PerRank(reader, _sum_of_all) if ruled else reader,
    }


def _save(me: Me, path: str) -> None:
    state = _state(me, random.Random(5))
    torch.manual_seed(me.rank)
    np.random.seed(me.rank)
    random.seed(me.rank)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, state).result(60)


def _draw(state: dict[str, Any]) -> dict[str, Any]:
    own = state["rng"].generators
    return {
        "python": random.random(),
        "numpy": float(np.random.rand()),
        "torch": torch.rand(2).tolist(),
        "noise": float(own["noise"].random()),
        "shuffle": own["shuffle"].random(),
    }


def _resume(me: Me, path: str) -> tuple[list[dict[str, Any]], int, int, int, list[Event]]:
    """Resume twice: what is drawn after each, and what else has come back."""
    draws, events = [], []
    for _ in range(2):
        state = _state(me, random.Random(me.rank))
        state["alike"].value.at = state["epoch"]["n"] = -1
        with asyncckpt.Checkpointer(path, ranks=TIMEOUT, on_event=events.append) as run:
            assert run.resume(state) == 1
        draws.append(_draw(state))
    changed = [event for event in events if isinstance(event, RanksChanged)]
    return draws, state["alike"].value.at, state["epoch"]["n"], state["reader"].value.at, changed[: len(changed) // 2]


def test_more_ranks_draw_streams_of_their_own_and_read_by_the_rule(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crews(2).values(_save, path)
    found = crews(4).values(_resume, path)
    for draws, *_ in found:
        assert draws[0] == draws[1], "a run that is restored again draws other numbers"
    for name in ("python", "numpy", "torch", "noise"):
        assert len({repr(draws[0][name]) for draws, *_ in found}) == 4, f"ranks share their stream of {name}"
    assert len({draws[0]["shuffle"] for draws, *_ in found}) == 1, "what was everybody's is everybody's still"
    assert found[0][0][0]["shuffle"] == random.Random(5).random()
    assert [one[1:4] for one in found] == [(7, 4, 30 + 1000 * rank + 4) for rank in range(4)]
    for rank, (*_, changed) in enumerate(found):
        told = [(e.rank, e.ranks, e.saved_ranks, e.derived, e.dropped) for e in changed]
        assert told == ([(rank, 4, 2, ("rng",), ())] if rank > 1 else []), told


def test_fewer_ranks_keep_their_streams_and_read_by_the_rule(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crews(2).values(_save, path)
    ((draws, alike, epoch, at, changed),) = crews(1).values(_resume, path)
    torch.manual_seed(0)
    assert draws[0]["torch"] == torch.rand(2).tolist()
    assert (alike, epoch, at, changed) == (7, 4, 31, [])


def _resume_without_rule(me: Me, path: str) -> tuple[str, tuple[str, ...], int, list[Any]]:
    events: list[Event] = []
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT, on_event=events.append) as run:
        state = _state(me, random.Random(0), ruled=False)
        message = ""
        try:
            run.restore(state)
        except asyncckpt.StateMismatch as error:
            message = str(error)
        state["reader"].at = -1
        report = run.restore(state, strict=False)
    dropped = [event.dropped for event in events if isinstance(event, RanksChanged) and event.dropped]
    return message, report.mismatched, state["reader"].at, dropped


def test_a_readers_position_is_never_given_to_another_rank(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crews(2).values(_save, path)
    found = crews(3).values(_resume_without_rule, path)
    message = found[2][0]
    for part in ("reader: ", "rank 2 of 3", "asyncckpt.Replicated(reader)", "asyncckpt.PerRank(reader, rule)"):
        assert part in message
    assert all(text for text, *_ in found), "some ranks went on without the others"
    assert [at for _, _, at, _ in found] == [10, 20, -1]
    assert [len(mismatched) for _, mismatched, *_ in found] == [0, 0, 1]
    ((message, _, at, dropped),) = crews(1).values(_resume_without_rule, path)
    assert (message, at, dropped) == ("", 10, [("reader",)] * 2)


def _save_alone(me: Me, path: str) -> None:
    with asyncckpt.Checkpointer(path) as run:
        run.save(1, {"reader": _Reader(3), "epoch": {"n": 2}, "rng": asyncckpt.RngState()}).result(60)


def _resume_alone_together(me: Me, path: str) -> list[Any]:
    state: dict[str, Any] = {"epoch": {"n": 0}, "rng": asyncckpt.RngState()}
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.restore(state)
        drawn = torch.rand(1).item()
        try:
            run.restore({**state, "reader": _Reader(0)})
        except asyncckpt.StateMismatch as error:
            return [state["epoch"]["n"], drawn, "reader" in str(error)]
    return [state["epoch"]["n"], drawn, False]


def test_what_one_process_saved_is_taken_apart_where_it_must(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crews(1).values(_save_alone, path)
    first, second = crews(2).values(_resume_alone_together, path)
    assert first[0] == second[0] == 2
    assert first[1] != second[1]
    assert [first[2], second[2]] == [True, True]
