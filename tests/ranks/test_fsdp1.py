"""FSDP as it was first, as far as torch still has it: its sharded state dicts are stored and restored like FSDP2's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from torch import nn

import asyncckpt


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 517), nn.ReLU(), nn.Linear(517, 129, bias=False), nn.LayerNorm(129))


def _wrapped(me: Me, meshed: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    warnings.simplefilter("ignore")  # it is deprecated, which is why this is here
    mesh = init_device_mesh("cpu", (me.size,)) if meshed else None
    model = FullyShardedDataParallel(_net(), use_orig_params=True, device_id=torch.device("cpu"), device_mesh=mesh)
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    return model


def _saved(me: Me, path: str, meshed: bool) -> None:
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, {"model": _wrapped(me, meshed)}).result(60)


def _restored(me: Me, path: str, meshed: bool) -> None:
    """Into one whose values are others."""
    model = _wrapped(me, meshed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        assert run.restore({"model": model}).step == 1
        run.save(2, {"model": model}).result(60)


@pytest.mark.parametrize("meshed", [False, True], ids=["ShardedTensor", "DTensor"])
def test_sharded_state_dicts_of_fsdp1_come_back(meshed: bool, crews: Crews, tmp_path: Path) -> None:
    path = tmp_path / "run"
    crews(3).values(_saved, str(path), meshed)
    expected = _net().state_dict()
    for step in (1, 2):
        if step == 2:
            crews(2).values(_restored, str(path), meshed)
        found = asyncckpt.Run(path).load_tensors(step)
        assert found.keys() == {f"model.{name}" for name in expected}
        assert all(torch.equal(found[f"model.{name}"], value) for name, value in expected.items())
