"""Directories of ``torch.distributed.checkpoint`` out: ``dcp.load`` opens them, and a job of FSDP2 resumes from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Tiny, train
from support.foreign import bits, exported, imported, saved
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from asyncckpt import InvalidOption, Run
from asyncckpt.convert.selection import Selection


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Run, Any, Any]:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 2)
    state = {"model": model, "optimizer": optimizer, "progress": {"epoch": 3}}
    return saved(tmp_path / "run", state, 7, metrics={"loss": 0.5}), model, optimizer


@pytest.mark.filterwarnings("ignore")
def test_dcp_load_gives_what_was_saved_optimizer_included(trained: Any, tmp_path: Path) -> None:
    run, model, optimizer = trained
    exported(run, tmp_path / "out", format="dcp", what="all")
    torch.manual_seed(1)
    fresh = Tiny()
    resumed = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad])
    weights, moments = get_state_dict(fresh, resumed)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "progress": {"epoch": 0}, "step": 0}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    set_state_dict(fresh, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert bits(dict(fresh.state_dict())) == bits(dict(model.state_dict()))
    assert bits(resumed.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    assert (state["progress"], state["step"]) == ({"epoch": 3}, 7)


def test_what_went_out_comes_in_again_chosen_and_renamed(trained: Any, tmp_path: Path) -> None:
    run, model, _ = trained
    exported(run, tmp_path / "out", format="dcp")
    back, done = imported(tmp_path / "out", tmp_path / "back")
    assert bits(dict(back.load(component="model"))) == bits(dict(model.state_dict()))
    chosen = Selection(include=["model.hidden.*"], rename={"model.hidden": "model.first"})
    back, done = imported(tmp_path / "out", tmp_path / "part", selection=chosen)
    assert done.tensors == 2
    assert set(back.load(component="model")) == {"first.weight", "first.bias"}
    with pytest.raises(InvalidOption, match=r"--include nothing"):
        imported(tmp_path / "out", tmp_path / "none", selection=Selection(include=["nothing*"]))
