"""What an optimizer and a module hold comes back as it was: dtype, memory format, and nothing that does not fit."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import bits
from torch import nn

from asyncckpt import Checkpointer, Run, StateMismatch, UnsupportedValue


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def save(path: Path, **state: Any) -> Run:
    path.mkdir(exist_ok=True)
    with Checkpointer(path / "run") as run:
        run.save(1, state).result()
    return Run(path / "run")


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **options)


def test_the_live_optimizer_keeps_wide_state_when_it_is_restored(tmp_path: Path) -> None:
    model = nn.Linear(3, 3).bfloat16()
    optimizer = stepped(model, adam(model))
    state = optimizer.state[model.weight]
    state["master"], state["order"] = torch.randn(3, 3), torch.arange(300, 309)
    kept = {key: value.clone() for key, value in state.items()}
    run = save(tmp_path, model=model, optimizer=optimizer)
    state["master"].zero_()
    run.restore({"model": model, "optimizer": optimizer})
    assert optimizer.state[model.weight] is state
    assert {key: (value.dtype, bits(value)) for key, value in state.items()} == {
        key: (value.dtype, bits(value)) for key, value in kept.items()
    }


@pytest.mark.parametrize("hooked", [False, True])
def test_wide_state_survives_a_class_that_loads_by_itself(hooked: bool, tmp_path: Path) -> None:
    class Loading(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.told = True

    def make() -> Any:
        model = nn.Linear(3, 3).bfloat16()
        return model, (adam(model) if hooked else Loading(model.parameters()))

    model, optimizer = make()
    stepped(model, optimizer).state[model.weight]["exp_avg"] = wide = torch.randn(3, 3)
    run = save(tmp_path, model=model, optimizer=optimizer)
    other, fresh = make()
    called: list[Any] = []
    if hooked:
        fresh.register_load_state_dict_post_hook(called.append)
    run.restore({"model": other, "optimizer": fresh})
    assert called == [fresh] if hooked else fresh.told
    found = fresh.state[other.weight]["exp_avg"]
    assert (found.dtype, bits(found)) == (torch.float32, bits(wide))


def test_state_of_a_parameter_that_grew_is_left_out_and_reported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2))
    run = save(tmp_path, model=model, optimizer=stepped(model, adam(model)))
    grown = nn.Sequential(nn.Embedding(7, 2), nn.Linear(2, 2))
    optimizer = adam(grown, fused=True)
    with pytest.raises(StateMismatch, match=r"optimizer\.0\.weight"):
        run.restore({"model": grown, "optimizer": optimizer})
    report = run.restore({"model": grown, "optimizer": optimizer}, strict=False)
    assert [text.split(":")[0] for text in report.mismatched] == ["model.0.weight", "optimizer.0.weight"]
    assert grown[0].weight not in optimizer.state
    assert optimizer.state[grown[1].weight]["exp_avg"].any()
    stepped(grown, optimizer)


def test_another_class_and_other_keys_of_state_are_told(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    run = save(tmp_path, model=model, optimizer=stepped(model, adam(model)))
    with pytest.raises(StateMismatch, match=r"AdamW.*SGD"):
        run.restore({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    live = adam(model)
    live.state[model.weight] = {"momentum": torch.zeros(2, 2)}
    with pytest.raises(StateMismatch, match=r"optimizer\.weight: saved with the state .*, live with momentum"):
        run.restore({"model": model, "optimizer": live})


def test_renaming_a_parameter_moves_its_state(tmp_path: Path) -> None:
    model = nn.ModuleDict({"old": nn.Linear(2, 2), "same": nn.Linear(2, 2)})
    optimizer = stepped(model, adam(model))
    run = save(tmp_path, model=model, optimizer=optimizer)
    new = nn.ModuleDict({"same": nn.Linear(2, 2), "new": nn.Linear(2, 2)})
    fresh = adam(new)
    run.restore({"model": new, "optimizer": fresh}, rename={"model.old.": "model.new."})
    for left, right in ((model["old"], new["new"]), (model["same"], new["same"])):
        assert bits(optimizer.state[left.weight]["exp_avg"]) == bits(fresh.state[right.weight]["exp_avg"])


@dataclasses.dataclass
class Scales:
    """What an optimizer may keep beside tensors."""

    rows: torch.Tensor
    power: int


class Counter:
    """An object with a state of its own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Keeping(torch.optim.SGD):
    """Keeps objects in its state."""

    def keep(self, parameter: torch.Tensor) -> None:
        counter = Counter()
        counter.count = 7
        self.state[parameter] = {"scales": Scales(torch.arange(3.0), 2), "counter": counter}


def test_objects_with_a_state_come_back_and_others_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Keeping(model.parameters(), lr=0.1)
    optimizer.keep(model.weight)
    run = save(tmp_path, model=model, optimizer=optimizer)
    fresh = Keeping(model.parameters(), lr=0.1)
    run.restore({"model": model, "optimizer": fresh})
    found = fresh.state[model.weight]
    assert type(found["scales"]) is Scales
    assert (found["scales"].power, found["counter"].count) == (2, 7)
    assert torch.equal(found["scales"].rows, torch.arange(3.0))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StateMismatch):
        run.restore({"model": model, "optimizer": plain})
    optimizer.state[model.weight]["thing"] = object()
    with pytest.raises(UnsupportedValue, match=r"weight.*thing"):
        save(tmp_path / "other", model=model, optimizer=optimizer)


def test_a_dataclass_with_more_than_its_fields_is_refused_rather_than_cut(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Keeping(model.parameters(), lr=0.1)
    optimizer.keep(model.weight)
    optimizer.state[model.weight]["scales"].note = "set later"
    with pytest.raises(UnsupportedValue, match=r"scales.*no fields of it \(note\)"):
        save(tmp_path, model=model, optimizer=optimizer)


class Rule(enum.Enum):
    """What a parameter group may hold beside numbers."""

    LINEAR = "linear"
    COSINE = "cosine"


class Span(NamedTuple):
    begin: int
    rule: Rule


def test_hyperparameters_get_the_types_that_live_in_their_group(tmp_path: Path) -> None:
    def make(rule: Rule, begin: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        group = {"params": model.parameters(), "rule": rule, "by_rule": {rule: begin}, "span": Span(begin, rule)}
        group["scales"] = Scales(torch.full((2,), float(begin)), begin)
        return model, torch.optim.SGD([group], lr=0.1)

    model, optimizer = make(Rule.COSINE, 4)
    run = save(tmp_path, model=model, optimizer=optimizer)
    other, fresh = make(Rule.LINEAR, 0)
    run.restore({"model": other, "optimizer": fresh})
    (group,) = fresh.param_groups
    assert group["rule"] is Rule.COSINE
    assert group["by_rule"] == {Rule.COSINE: 4}
    assert (type(group["span"]), group["span"]) == (Span, Span(4, Rule.COSINE))
    assert (type(group["scales"]), group["scales"].power) == (Scales, 4)
    assert torch.equal(group["scales"].rows, torch.full((2,), 4.0))


def test_an_object_in_an_optimizer_asks_for_a_reader_that_knows_its_tag(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Keeping(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result()
        optimizer.keep(model.weight)
        run.save(2, {"model": model, "optimizer": optimizer}).result()
    versions = [
        json.loads(path.read_text())["format_version"] for path in (tmp_path / "run").glob("step-*/manifest.json")
    ]
    assert sorted(versions) == [1, 4]
    assert Run(tmp_path / "run").verify() == []


def test_memory_format_is_restored_for_modules_and_state(tmp_path: Path) -> None:
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = stepped(model, adam(model))
    factor = torch.randn(4, 5).t()
    optimizer.state[model.weight]["factor"] = factor
    run = save(tmp_path, model=model, optimizer=optimizer, buffer={"t": factor})
    other = nn.Conv2d(2, 3, 3)
    fresh = adam(other)
    run.restore({"model": other, "optimizer": fresh, "buffer": {}})
    assert other.weight.stride() == model.weight.stride()
    assert torch.equal(other.weight, model.weight)
    for key, value in optimizer.state[model.weight].items():
        assert fresh.state[other.weight][key].stride() == value.stride(), key
        assert torch.equal(fresh.state[other.weight][key], value)
    meta = nn.Conv2d(2, 3, 3, device="meta")
    run.restore({"model": meta})
    assert meta.weight.stride() == model.weight.stride()


def test_state_lies_as_a_parameter_whose_format_was_changed_on_purpose(tmp_path: Path) -> None:
    model = nn.Conv2d(2, 3, 3)
    run = save(tmp_path, model=model, optimizer=stepped(model, adam(model)))
    other = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    fresh = adam(other, fused=True)
    run.restore({"model": other, "optimizer": fresh})
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    assert fresh.state[other.weight]["exp_avg"].stride() == other.weight.stride()


def test_a_wrapper_with_a_state_dict_of_its_own_comes_back_and_needs_the_same_order(tmp_path: Path) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return self.inner.param_groups

        def state_dict(self) -> Any:
            return {"inner": self.inner.state_dict()}

        def load_state_dict(self, state: Any) -> None:
            self.inner.load_state_dict(state["inner"])

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).bfloat16()
    inner = adam(model)
    stepped(model, inner).state[model["a"].weight]["exp_avg"] = wide = torch.randn(2, 2)
    run = save(tmp_path, model=model, optimizer=Wrapper(inner))
    fresh = adam(model)
    run.restore({"model": model, "optimizer": Wrapper(fresh)})
    assert bits(fresh.state[model["a"].weight]["exp_avg"]) == bits(wide)
    turned = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)}).bfloat16()
    with pytest.raises(StateMismatch, match="another order"):
        run.restore({"model": turned, "optimizer": Wrapper(adam(turned))})


class Spread(nn.Module):
    """Has buffers whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.register_buffer("grid", torch.zeros(1, 3).expand(4, -1))
        self.register_buffer("windows", torch.zeros(6).unfold(0, 3, 1))


def test_buffers_whose_elements_share_memory_come_back(tmp_path: Path) -> None:
    model = Spread()
    model.grid[0] = torch.tensor([1.0, 2.0, 3.0])
    model.windows.as_strided((6,), (1,)).copy_(torch.arange(6.0))
    run = save(tmp_path, model=model)
    other = Spread()
    run.restore({"model": other})
    assert torch.equal(other.grid, model.grid)
    assert torch.equal(other.windows, model.windows)
    model.grid = torch.randn(4, 3)
    run = save(tmp_path / "other", model=model)
    with pytest.raises(StateMismatch, match=r"grid.*share memory"):
        run.restore({"model": other})


class Calibrated(nn.Module):
    """Takes the shape of what it loads, and asks for all that is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("count", torch.zeros(()))
        self.loaded = False

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.low.resize_(state[prefix + "low"].shape)
        self.loaded = bool(state[prefix + "count"] >= 0)
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_buffer_that_its_module_resizes_on_loading_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Calibrated(), Calibrated())
    model[1].low = torch.randn(5)
    model[1].count.fill_(3)
    run = save(tmp_path, model=model)
    other = nn.Sequential(nn.Linear(2, 2), Calibrated(), Calibrated())
    run.restore({"model": other})
    assert torch.equal(other[1].low, model[1].low)
    assert other[1].count == 3
    assert other[1].loaded
    assert bits(other[0]) == bits(model[0])


def test_layers_may_be_wrapped_between_two_saves(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    optimizer = stepped(model, adam(model))
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result()
        model[0] = torch.compile(model[0])
        model[1][0] = nn.DataParallel(model[1][0])
        run.save(2, {"model": model, "optimizer": optimizer}).result()
        bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        run.restore({"model": bare, "optimizer": adam(bare)}, step=2)
        assert torch.equal(bare[1][0].weight, model[1][0].module.weight)
        run.restore({"model": model, "optimizer": optimizer}, step=1)


def test_a_parameter_that_was_replaced_is_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = adam(model)
    model.weight = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(UnsupportedValue, match=r"model\.weight has its shape.*replaced"):
        save(tmp_path, model=model, optimizer=optimizer)
