"""A rank that fails before a save communicates: the others learn it at once, and none of them waits in a collective."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.harness import Crews, Me
from torch import nn

import asyncckpt

#: Much longer than any of this may take: whoever waits for it has hung.
PATIENT = asyncckpt.RankOptions(timeout_seconds=40)


class _Sampler:
    """Gives its state, or fails to."""

    def __init__(self) -> None:
        self.broken = False

    def state_dict(self) -> dict[str, Any]:
        if self.broken:
            raise ValueError("the worker is gone")
        return {"at": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"at": 3}


def _columns() -> nn.Module:
    """A module whose weight is split by columns, which every save redistributes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    module = nn.Module()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module.weight = nn.Parameter(distribute_tensor(torch.arange(64.0).view(8, 8), mesh, [Shard(1)]))
    return module


def _told(call: Any) -> str:
    """What a call ends with; ``late`` where that took longer than a message takes."""
    began = time.monotonic()
    try:
        pending = call()
        error = pending.exception(60) if pending is not None else None
    except Exception as raised:
        error = raised
    late = "late: " if time.monotonic() - began > PATIENT.timeout_seconds / 4 else ""
    return f"{late}{type(error).__name__}: {error}"


def _fail_here_and_there(me: Me, path: str) -> list[str]:
    sampler, found = _Sampler(), []
    state = {"sampler": sampler, "model": _columns()}
    for step, odd, first in ((1, 1, True), (2, 0, True), (4, 1, False), (6, 0, False)):
        run = asyncckpt.Checkpointer(f"{path}-{step}", ranks=PATIENT)
        if not first:  # the ranks have a plan already, and would meet for the collective alone
            run.save(1, state).result(60)
        sampler.broken = me.rank == odd
        if first:
            found.append(_told(lambda run=run: run.prepare(state)))  # type: ignore[misc]
        found.append(_told(lambda run=run: run.save(2, state)))  # type: ignore[misc]
        sampler.broken = False
        found.append(_told(lambda run=run: run.save(3, dict(reversed(state.items())))))  # type: ignore[misc]
        with contextlib.suppress(asyncckpt.AsyncCkptError):
            run.close()
    return found


def test_what_one_rank_cannot_capture_fails_on_all_at_once(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_fail_here_and_there, str(tmp_path / "run"))
    failed = [index for index, text in enumerate(found[0]) if index not in (2, 5, 7, 9)]
    for rank, texts in enumerate(found):
        assert all("the worker is gone" in texts[index] for index in failed), texts
        assert not any(text.startswith("late") for text in texts), texts
        for index, odd in zip(failed, (1, 1, 0, 0, 1, 0), strict=True):
            kind = "ValueError: " if rank == odd else f"SaveFailed: ValueError: rank {odd}"
            assert texts[index].startswith(kind), texts
    # the save after it is a good one, whatever the order of the components
    for step in (1, 2, 4, 6):
        run = asyncckpt.Run(f"{tmp_path}/run-{step}")
        assert run.ls()[-1].step == 3
        assert torch.equal(run.load_tensors(3)["model.weight"], torch.arange(64.0).view(8, 8))


def _change_names_on_one_rank(me: Me, path: str, odd: int) -> list[str]:
    state: dict[str, Any] = {"model": _columns()}
    with asyncckpt.Checkpointer(path, ranks=PATIENT) as run:
        run.save(1, state).result(60)
        if me.rank == odd:
            state["more"] = torch.ones(3)
        return [_told(lambda step=step: run.save(step, state)) for step in (2, 3)]  # type: ignore[misc]


def test_ranks_that_meet_for_a_collective_plan_anew_where_one_has_changed(crews: Crews, tmp_path: Path) -> None:
    for odd in (0, 1):
        path = str(tmp_path / f"run-{odd}")
        assert crews(2).values(_change_names_on_one_rank, path, odd) == [["NoneType: None"] * 2] * 2
        assert asyncckpt.Run(path).load_tensors(2)["more.value"].tolist() == [1, 1, 1]
