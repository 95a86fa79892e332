"""``ZeroRedundancyOptimizer``: each rank's part is stored under the parameters' names, so any job goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from torch import nn

import asyncckpt


def _parts(me: Me) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model and its optimizer, of two groups: with several ranks torch's, which spreads the state, else Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 6))
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.01, "weight_decay": 0.3}]
    optimizer: torch.optim.Optimizer
    if me.size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.1)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> None:
    for _ in range(steps):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * number) + parameter.detach()
        optimizer.step()
        schedule.step()


def _run(me: Me, path: str, first: bool) -> list[list[float]]:
    """Save after 3 steps of 5, or resume from there; the model that comes out."""
    model, optimizer, schedule = _parts(me)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        if first:
            _train(model, optimizer, schedule, 3)
            run.save(3, state).result(60)
        else:
            assert run.resume(state) == 3
        _train(model, optimizer, schedule, 2)
    return [parameter.flatten().tolist() for parameter in model.parameters()]


def test_any_job_goes_on_with_what_any_other_saved(crews: Crews, tmp_path: Path) -> None:
    for saved_by in (2, 1):
        path = str(tmp_path / f"run-{saved_by}")
        whole = crews(saved_by).values(_run, path, True)
        for size in (2, 3, 1):
            for found in crews(size).values(_run, path, False):
                assert found == whole[0], f"{saved_by} ranks saved, {size} go on"
    kept = [set(asyncckpt.Run(f"{tmp_path}/run-{size}").load_tensors(3, ["optimizer"])) for size in (1, 2)]
    assert kept[0] == kept[1]


def _overlapping(me: Me, path: str) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(3, 3)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, overlap_with_ddp=True, lr=0.1)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        with pytest.raises(asyncckpt.UnsupportedValue) as caught:
            run.save(1, {"model": model, "optimizer": optimizer})
        return str(caught.value)


def test_one_that_steps_in_backward_is_refused_with_a_way_out(crews: Crews, tmp_path: Path) -> None:
    for text in crews(2).values(_overlapping, str(tmp_path / "run")):
        assert "ZeroRedundancyOptimizer" in text
        assert "overlap_with_ddp=False" in text
