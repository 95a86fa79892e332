"""Parameter groups of several ranks are united by what is in them, and found again by the names of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from torch import nn

import asyncckpt
from asyncckpt import RanksDisagree
from asyncckpt.ranks.merging import merge_trees


def _layers(*numbers: int) -> nn.ModuleDict:
    return nn.ModuleDict({f"layer{number}": nn.Linear(4, 4) for number in numbers})


def _grouped(model: nn.ModuleDict, rates: dict[str, Any]) -> torch.optim.AdamW:
    """Make an optimizer with a group for each of the rates, a tensor where that is one."""
    named = dict(model.named_parameters())
    groups = [{"params": [named[name]], "lr": rate} for name, rate in rates.items() if name in named]
    return torch.optim.AdamW(groups, weight_decay=0.0, capturable=False)


def _rates(*, tensors: bool) -> dict[str, Any]:
    """A rate of its own for each parameter of three layers; some are equal."""
    names = [f"layer{layer}.{part}" for layer in range(3) for part in ("weight", "bias")]
    rates = dict(zip(names, (0.1, 0.2, 0.3, 0.1, 0.2, 0.5), strict=True))
    return {name: torch.tensor(rate) if tensors else rate for name, rate in rates.items()}


def _stage(me: Me, *, tensors: bool) -> tuple[nn.ModuleDict, torch.optim.AdamW]:
    """Each of two ranks has a stage of the pipeline, the second one two layers in another order; one rank has all."""
    model = _layers(*([0, 1, 2] if me.size == 1 else [0] if me.rank == 0 else [2, 1]))
    optimizer = _grouped(model, _rates(tensors=tensors))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def _rates_of(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: round(float(g["lr"]), 6) for g in optimizer.param_groups for p in g["params"]}


def _save_stage(me: Me, path: str, tensors: bool) -> None:
    model, optimizer = _stage(me, tensors=tensors)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result(60)


def _without_state(me: Me, path: str) -> list[float]:
    """Save before the first step, when no optimizer has any tensors."""
    model = _layers(me.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + me.rank)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result(60)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 7.0 + me.rank})
        state = {"model": model, "more": optimizer.param_groups[1]["params"][0].detach(), "optimizer": optimizer}
        optimizer.param_groups[1]["params"][0] = model[f"layer{me.rank}"].extra = nn.Parameter(torch.ones(1))
        run.save(2, state).result(60)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        run.restore(state, step=2)
    return [group["lr"] for group in optimizer.param_groups]


def test_optimizers_that_have_no_state_yet_are_told_apart_by_their_parameters(crews: Crews, tmp_path: Path) -> None:
    assert crews(2).values(_without_state, str(tmp_path / "run")) == [[1.0, 7.0], [2.0, 8.0]]


def _load_stage(me: Me, path: str, tensors: bool) -> dict[str, float]:
    model, optimizer = _stage(me, tensors=tensors)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(9.0) if tensors else 9.0
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.resume({"model": model, "optimizer": optimizer})
    assert all(float(entry["step"]) == 1 for entry in optimizer.state.values())
    return _rates_of(model, optimizer)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_each_stage_gets_its_own_hyper_parameters_again(tensors: bool, crews: Crews, tmp_path: Path) -> None:
    expected = {name: round(float(rate), 6) for name, rate in _rates(tensors=tensors).items()}
    for saved_by in (2, 1):
        path = str(tmp_path / f"run-{saved_by}")
        crews(saved_by).values(_save_stage, path, tensors)
        for size in (2, 1):
            found = crews(size).values(_load_stage, path, tensors)
            assert {name: rate for rank in found for name, rate in rank.items()} == expected, (saved_by, size)


def _disagree(me: Me, path: str) -> list[str]:
    """Save what differs on rank 1, in several ways; what each save ends with."""
    found: list[str] = []
    model = _layers(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    states: list[dict[str, Any]] = []
    for step in range(4):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + me.rank) if step == 0 else 0.1)
        states.append({"model": model, "optimizer": optimizer})
    states[1]["note"] = asyncckpt.Replicated({"seed": me.rank})
    part = asyncckpt.LocalShard(torch.ones(2, 3), (4, 3), (2 * me.rank, 0))
    states[2]["parts"] = {"table": part, "mode": {"of": f"rank {me.rank}"}}
    states[3]["optimizer"] = asyncckpt.Owner(
        torch.optim.SGD(model.parameters(), lr=0.1 * (1 + me.rank), momentum=0.1), rank=1
    )
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        for step, state in enumerate(states):
            try:
                error = run.save(step, state).exception(60)
            except asyncckpt.AsyncCkptError as raised:
                error = raised
            found.append(f"{type(error).__name__}: {error}")
        run.restore(states[3], step=3)
    return [*found, str(round(states[3]["optimizer"].value.param_groups[0]["lr"], 6))]


def test_values_that_differ_are_told_with_their_names_and_nobodys_are_taken(crews: Crews, tmp_path: Path) -> None:
    for rank, found in enumerate(crews(2).values(_disagree, str(tmp_path / "run"))):
        wanted = ["optimizer.param_groups of rank 1", "note.value of rank 1", "parts.mode.of differs between"]
        for text, what in zip(found, wanted, strict=False):
            assert all(part in text for part in ("RanksDisagree: ", what, "asyncckpt.Owner(")), (rank, text)
        assert found[3:] == ["NoneType: None", "0.2"], (rank, found)
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [3]


# -- without processes -----------------------------------------------------------------------------------------------


@given(st.data())
@examples(50)
def test_any_division_of_groups_keeps_each_parameters_values(data: st.DataObject) -> None:
    """Whatever ranks hold whichever parameters, in groups of any number: united, each has what it had."""
    names = [f"p{number}" for number in range(8)]
    lr = {name: data.draw(st.sampled_from([0.1, 0.2, 0.3]), label=name) for name in names}
    trees = []
    for rank in range(data.draw(st.integers(1, 4))):
        held = data.draw(st.permutations(names))[: data.draw(st.integers(0, len(names)))]
        groups: list[Any] = []
        for name in held:
            fits = [group for group in groups if group["lr"] == lr[name]]
            if fits and data.draw(st.booleans()):
                fits[0]["params"].append(name)
            else:
                groups.append({"lr": lr[name], "params": [name]})
        trees.append((rank, {"state": {name: {"step": 1} for name in held}, "param_groups": groups}))
    merged: Any = merge_trees("optimizer", "optimizer", trees, {})
    found = [(name, group["lr"]) for group in merged["param_groups"] for name in group["params"]]
    assert dict(found) == {name: lr[name] for _, tree in trees for name in tree["state"]}
    assert len(dict(found)) == len(found), "a parameter is in two groups"
    assert merged["state"].keys() == dict(found).keys()


def test_groups_with_equal_tensors_are_one_and_others_are_not() -> None:
    def tree(name: str) -> Any:
        return {
            "state": {},
            "param_groups": [{"lr": {"$": "tensor", "v": f"param_groups.{name}.lr"}, "params": [name, "shared"]}],
        }

    equal = {"param_groups.a.lr": "1", "param_groups.b.lr": "1"}
    merged: Any = merge_trees("optimizer", "optimizer", [(0, tree("a")), (1, tree("b"))], equal)
    assert [group["params"] for group in merged["param_groups"]] == [["a", "shared", "b"]]
    with pytest.raises(RanksDisagree, match=r"lr of parameter 'shared' differs between ranks 0 and 3"):
        merge_trees("optimizer", "optimizer", [(0, tree("a")), (3, tree("b"))], {**equal, "param_groups.b.lr": "2"})


def test_a_live_group_of_parameters_that_were_saved_differently_is_told(tmp_path: Path) -> None:
    model = _layers(0, 1)
    with asyncckpt.Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model, "optimizer": _grouped(model, _rates(tensors=False))}).result()
        named = dict(model.named_parameters())
        pairs = [
            ["layer0.weight", "layer1.bias"],
            ["layer0.bias", "layer1.weight"],
            [],
            [],
        ]  # of which 0.1 alone is one
        optimizer = torch.optim.AdamW(
            [{"params": [named[name] for name in pair], "lr": 5.0} for pair in pairs], weight_decay=0.0
        )
        with pytest.raises(asyncckpt.StateMismatch, match=r"lr of layer0.bias, layer1.weight differ"):
            run.restore({"model": model, "optimizer": optimizer})
        run.restore({"model": model, "optimizer": optimizer}, strict=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 5.0, 5.0, 5.0]
