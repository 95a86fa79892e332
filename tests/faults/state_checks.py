"""Checks that planted bugs in what is captured and restored have to be caught by: each a plain function of an empty
directory, as in ``mutant_checks``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asyncckpt import Checkpointer, Run, StateMismatch


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _save(path: Path, **state: Any) -> Run:
    with Checkpointer(path / "run") as run:
        run.save(1, state).result()
    return Run(path / "run")


def _stepped(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    optimizer = kind(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _refused(call: Callable[[], object], what: str) -> None:
    said = "nothing"
    try:
        call()
    except StateMismatch as error:
        said = str(error)
    assert what in said, said


class _Loading(torch.optim.AdamW):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


def _wide_state(path: Path, kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(3, 3).bfloat16()
    optimizer = _stepped(model, kind)
    state = optimizer.state[model.weight]
    state["exp_avg"], state["order"] = torch.randn(3, 3), torch.arange(300, 309)
    run = _save(path, model=model, optimizer=optimizer)
    other = nn.Linear(3, 3).bfloat16()
    fresh = kind(other.parameters(), lr=0.1)
    run.restore({"model": other, "optimizer": fresh})
    found = fresh.state[other.weight]
    assert {key: _bits(value) for key, value in found.items()} == {key: _bits(value) for key, value in state.items()}


def an_optimizer_has_the_dtypes_that_it_had(path: Path) -> None:
    _wide_state(path, torch.optim.AdamW)


def so_has_one_that_loads_by_itself(path: Path) -> None:
    _wide_state(path, _Loading)


def tensors_lie_in_memory_as_they_did(path: Path) -> None:
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = _stepped(model)
    optimizer.state[model.weight]["factor"] = torch.randn(4, 5).t()
    run = _save(path, model=model, optimizer=optimizer)
    other = nn.Conv2d(2, 3, 3)
    fresh = torch.optim.AdamW(other.parameters())
    run.restore({"model": other, "optimizer": fresh})
    assert other.weight.stride() == model.weight.stride(), "the weight is row-major"
    for key, value in optimizer.state[model.weight].items():
        assert fresh.state[other.weight][key].stride() == value.stride(), f"{key} lies otherwise"


def state_of_another_shape_is_told(path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2))
    run = _save(path, optimizer=_stepped(model), model=model)
    grown = nn.Sequential(nn.Embedding(7, 2), nn.Linear(2, 2))
    grown[0].weight.requires_grad_(True)
    state = {"model": grown, "optimizer": torch.optim.AdamW(grown.parameters())}
    _refused(lambda: run.restore(state, include=["optimizer"]), "optimizer.0.weight")
    report = run.restore(state, strict=False)
    assert len(report.mismatched) == 2, report.mismatched
    assert grown[0].weight not in state["optimizer"].state


def another_class_is_told(path: Path) -> None:
    model = nn.Linear(2, 2)
    run = _save(path, model=model, optimizer=_stepped(model, torch.optim.Adagrad))
    _refused(lambda: run.restore({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}), "SGD")


def each_parameter_has_the_learning_rate_it_had(path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

    def make(order: str) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": model[name].parameters(), "lr": ord(name)} for name in order])

    run = _save(path, model=model, optimizer=make("ab"))
    turned = make("ba")
    for group in turned.param_groups:
        group["lr"] = 0.0
    run.restore({"model": model, "optimizer": turned})
    assert [group["lr"] for group in turned.param_groups] == [ord("b"), ord("a")]


def a_renamed_parameter_keeps_its_state(path: Path) -> None:
    old = nn.ModuleDict({"old": nn.Linear(2, 2)})
    run = _save(path, model=old, optimizer=(optimizer := _stepped(old)))
    new = nn.ModuleDict({"new": nn.Linear(2, 2)})
    fresh = torch.optim.AdamW(new.parameters())
    run.restore({"model": new, "optimizer": fresh}, rename={"model.old.": "model.new."})
    assert _bits(fresh.state[new["new"].weight]["exp_avg"]) == _bits(optimizer.state[old["old"].weight]["exp_avg"])


def wrapped_layers_go_by_their_own_names(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1][0] = nn.DataParallel(model[1][0])
    run = _save(path, model=model)
    bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    run.restore({"model": bare})
    assert _bits(bare[1][0].weight) == _bits(model[1][0].module.weight)


class _Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(6).unfold(0, 3, 1))


def elements_that_share_memory_get_one_value(path: Path) -> None:
    model = _Spread()
    model.grid.as_strided((6,), (1,)).copy_(torch.arange(6.0))
    run = _save(path, model=model)
    other = _Spread()
    run.restore({"model": other})
    assert torch.equal(other.grid, model.grid)
    model.grid = torch.randn(4, 3)
    run = _save(path / "run", model=model)
    _refused(lambda: run.restore({"model": _Spread()}), "share memory")


class _Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(0))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.low.resize_(state[prefix + "low"].shape)
        super()._load_from_state_dict(state, prefix, *rest)


def a_buffer_that_its_module_resizes_comes_back(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), _Resizing())
    model[1].low = torch.randn(5)
    run = _save(path, model=model)
    other = nn.Sequential(nn.Linear(2, 2), _Resizing())
    run.restore({"model": other})
    assert _bits(other[1].low) == _bits(model[1].low)
