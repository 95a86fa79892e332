"""Ranks whose snapshots are taken on devices: each has a stand-in of its own, and one without room fails the save on
all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from support.snapshot_device import StandIn, device_options, on_a_device
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import asyncckpt


def _sharded(me: Me) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    fully_shard(model, mesh=init_device_mesh("cpu", (me.size,)))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _local(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.to_local().clone() for parameter in model.parameters()]


def _save_and_train_on(me: Me, path: str) -> Any:
    model, optimizer = _sharded(me)
    _step(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    right = []
    with (
        pytest.MonkeyPatch.context() as patch,
        asyncckpt.Checkpointer(path, ranks=TIMEOUT, staging=device_options()) as run,
    ):
        device = on_a_device(patch, run, StandIn())
        for step in (1, 2, 3):
            expected = _local(model)
            device.hold("drain")
            pending = run.save(step, state)
            _step(model, optimizer)
            device.release()
            pending.result(60)
            run.wait()
            run.restore(state, step=step)
            right.append(all(map(torch.equal, expected, _local(model))))
            _step(model, optimizer)
    return right, device.ran.count("gather")


def test_each_rank_saves_its_part_of_the_moment(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_save_and_train_on, str(tmp_path / "run"))
    assert list(found) == [([True, True, True], 3)] * 2
    assert [asyncckpt.Run(tmp_path / "run").verify(step) for step in (1, 2, 3)] == [[], [], []]


def _one_has_no_room(me: Me, path: str) -> Any:
    model, optimizer = _sharded(me)
    _step(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    with (
        pytest.MonkeyPatch.context() as patch,
        asyncckpt.Checkpointer(path, ranks=TIMEOUT, staging=device_options()) as run,
    ):
        device = on_a_device(patch, run, StandIn())
        if me.rank == 1:
            device.free_bytes = 1 << 20
        try:
            error = run.save(1, state).exception(60)
        except asyncckpt.AsyncCkptError as raised:
            error = raised
        said = type(error).__name__, str(error)
        device.free_bytes = 8 << 30
        run.save(2, state).result(60)
    return said


def test_a_rank_whose_device_has_no_room_fails_the_save_on_all(crews: Crews, tmp_path: Path) -> None:
    found = list(crews(2).values(_one_has_no_room, str(tmp_path / "run")))
    assert found[1][0] == "NotEnoughMemory"
    assert "snapshot='host'" in found[1][1]
    assert "rank 1" in found[0][1]
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [2]
