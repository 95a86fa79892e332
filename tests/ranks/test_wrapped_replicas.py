"""Tensors that wrap others on several ranks: copies are stored once and must be equal, like all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import asyncckpt
from asyncckpt import RanksDisagree, Run


def _pair(seed: int) -> TwoTensor:
    torch.manual_seed(seed)
    return TwoTensor(torch.randn(300, 70), torch.randn(300, 70))


class _Keeps(torch.optim.SGD):
    """Has a wrapper in its state; this module names its class."""


def _state(seed: int) -> dict[str, Any]:
    model = nn.Linear(4, 4, bias=False)
    model.wrapped = nn.Parameter(_pair(seed), requires_grad=False)
    with torch.no_grad():
        model.weight.fill_(seed)
    optimizer = _Keeps([model.weight], lr=0.1)
    optimizer.state[model.weight]["moment"] = _pair(seed + 1)
    return {"model": model, "optimizer": optimizer}


def _save(me: Me, path: str, differ: int) -> str:
    for number, options in enumerate(({}, {"format": "zarr"}, {"per_rank": True})):
        with asyncckpt.Checkpointer(f"{path}-{number}", **by_stage(ranks=TIMEOUT, **SIZES, **options)) as run:
            try:
                run.save(1, _state(1 + differ * me.rank)).result(60)
            except RanksDisagree as error:
                return str(error)
            restored = _state(50)
            run.restore(restored)
            for found, wanted in (
                (restored["model"].wrapped, _pair(1)),
                (restored["optimizer"].state[restored["model"].weight]["moment"], _pair(2)),
            ):
                assert torch.equal(found.a, wanted.a)
                assert torch.equal(found.b, wanted.b)
    return ""


def test_replicas_of_wrappers_are_stored_once_and_come_back_everywhere(crews: Crews, tmp_path: Path) -> None:
    assert crews(2).values(_save, str(tmp_path / "run"), 0) == ["", ""]
    alone = _state(70)
    assert Run(tmp_path / "run-0").restore(alone).whole
    assert torch.equal(alone["model"].wrapped.b, _pair(1).b)


def test_replicas_of_wrappers_that_differ_fail_the_save(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_save, str(tmp_path / "run"), 1)
    assert all("differ" in text for text in found), found
    with pytest.raises(asyncckpt.CheckpointNotFound):
        Run(tmp_path / "run-0").load()
