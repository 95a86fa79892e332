"""A job of FSDP2 resumes with torch.distributed.checkpoint alone from what one process has exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.foreign import exported, saved
from support.harness import Crews, Me
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

_BEFORE, _AFTER = 3, 3


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 5, bias=False))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        given = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(given).square().mean().backward()
        optimizer.step()


def _resumed(me: Me, folder: str) -> dict[str, Any]:
    """Load the export into sharded objects, train on, and return the whole weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _net(seed=1)
    fully_shard(model, mesh=init_device_mesh("cpu", (me.size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    _train(model, optimizer, _BEFORE, _BEFORE + _AFTER)
    with torch.no_grad():
        return {name: value.full_tensor().numpy() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
def test_fsdp2_goes_on_from_an_export_of_one_process(crews: Crews, tmp_path: Path) -> None:
    model = _net(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    _train(model, optimizer, 0, _BEFORE)
    run = saved(tmp_path / "run", {"model": model, "optimizer": optimizer}, _BEFORE)
    exported(run, tmp_path / "out", format="dcp", what="all")
    _train(model, optimizer, _BEFORE, _BEFORE + _AFTER)
    for found in crews(2).values(_resumed, str(tmp_path / "out")):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=1e-5, atol=1e-6)
