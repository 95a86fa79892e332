"""A capture that builds on the one before finds exactly what one without finds, whatever has changed in between."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt.errors import UnsupportedValue
from asyncckpt.state.capture import capture
from asyncckpt.state.kept import KeptCaptures
from asyncckpt.types import Snapshot


class _Name(str):
    pass


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16))
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.first(self.body(x)))
        return found


class _Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value: Any = 0

    def get_extra_state(self) -> Any:
        return {"value": self.value, "tensor": torch.zeros(2)}

    def set_extra_state(self, state: Any) -> None:
        self.value = state["value"]


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Model()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "other": {"x": torch.zeros(3)}}


def _model(state: dict[str, Any]) -> Any:
    model = state["model"]
    return model.module if isinstance(model, nn.DataParallel) else model


def _step(state: dict[str, Any]) -> None:
    state["optimizer"].zero_grad()
    for group in state["optimizer"].param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    state["optimizer"].step()


def _entry(state: dict[str, Any]) -> dict[Any, Any]:
    """Return the optimizer's state of one parameter that has some."""
    found = [entry for entry in state["optimizer"].state.values() if entry]
    return found[0] if found else {}


def _tie(state: dict[str, Any]) -> None:
    model = _model(state)
    model.head.weight = model.first.weight


def _untie(state: dict[str, Any]) -> None:
    model = _model(state)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _share_memory(state: dict[str, Any]) -> None:
    model = _model(state)
    model.head.weight.data = model.first.weight.data.t()


def _new_optimizer(kind: Callable[..., Any], **options: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["optimizer"] = kind([p for p in state["model"].parameters() if p.requires_grad], lr=1e-3, **options)

    return change


def _made_anew(state: dict[str, Any]) -> None:
    loaded = state["optimizer"].state_dict()
    _new_optimizer(type(state["optimizer"]))(state)
    state["optimizer"].load_state_dict(loaded)


def _rename_key(state: dict[str, Any]) -> None:
    entry = _entry(state)
    if "exp_avg" in entry:
        entry["average"] = entry.pop("exp_avg")


def _other_key_type(state: dict[str, Any]) -> None:
    entry = _entry(state)
    if "exp_avg_sq" in entry:
        entry[_Name("exp_avg_sq")] = entry.pop("exp_avg_sq")


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        entry = _entry(state)
        if key in entry:
            entry[key] = value(entry[key]) if callable(value) else value

    return change


def _freeze(on: bool) -> Callable[[dict[str, Any]], None]:
    return lambda state: _model(state).body.requires_grad_(not on) and None


def _wrap(state: dict[str, Any]) -> None:
    state["model"] = nn.DataParallel(_model(state))


def _unwrap(state: dict[str, Any]) -> None:
    state["model"] = _model(state)


def _buffer(value: torch.Tensor, *, persistent: bool = True) -> Callable[[dict[str, Any]], None]:
    return lambda state: _model(state).register_buffer("extra", value.clone(), persistent=persistent)


def _swap_data(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        weight = _model(state).body[0].weight
        weight.grad = None
        weight.data = value(weight.data)

    return change


def _group(state: dict[str, Any]) -> None:
    model = _model(state)
    if not hasattr(model, "grown"):
        model.grown = nn.Linear(2, 2)
        state["optimizer"].add_param_group({"params": list(model.grown.parameters()), "lr": torch.tensor(0.1)})


_CHANGES: list[Callable[[dict[str, Any]], None]] = [
    _step,
    _step,
    _step,
    _tie,
    _untie,
    _share_memory,
    _new_optimizer(torch.optim.AdamW),
    _new_optimizer(torch.optim.SGD),
    _new_optimizer(torch.optim.SGD, momentum=0.9),
    _made_anew,
    _rename_key,
    _other_key_type,
    _set("step", 3),
    _set("exp_avg", lambda old: old.double() if isinstance(old, torch.Tensor) else old),
    _set("exp_avg", lambda old: old.reshape(-1) if isinstance(old, torch.Tensor) else old),
    _set("exp_avg", [1, 2]),
    _freeze(True),
    _freeze(False),
    _wrap,
    _unwrap,
    _buffer(torch.zeros(4)),
    _buffer(torch.zeros(0, dtype=torch.int8)),
    _buffer(torch.zeros(5), persistent=False),
    _swap_data(lambda old: old.clone()),
    _swap_data(lambda old: old.to(memory_format=torch.channels_last)),
    _swap_data(lambda old: old.contiguous()),
    _group,
    lambda state: setattr(_model(state), "more", _Extra()),
    lambda state: delattr(_model(state), "more"),
    lambda state: delattr(_model(state), "more"),
    lambda state: delattr(_model(state), "extra"),
    lambda state: setattr(_model(state), "renamed", _model(state)._modules.pop("grown")),
    lambda state: state.pop("other", None),
]


def _described(snapshot: Snapshot) -> list[Any]:
    """Return everything of a snapshot, with tensors as what they are and where they lie."""
    return [
        (
            *(one.name, one.kind, one.aliases, one.tree, one.shared, one.type_name, one.strides, one.parameters),
            [
                (
                    p.spec,
                    p.first_only,
                    p.private,
                    p.tensor.data_ptr(),
                    p.tensor.shape,
                    p.tensor.stride(),
                    p.tensor.dtype,
                )
                for p in one.pieces
                if not p.spec.name.endswith("_extra_state.tensor")
            ],
        )
        for one in snapshot.components
    ]


@pytest.mark.parametrize("seed", range(12))
def test_a_capture_that_builds_on_the_one_before_finds_what_one_without_finds(seed: int) -> None:
    rng, kept, state = random.Random(seed), KeptCaptures(), _state()
    for number in range(60):
        change = rng.choice(_CHANGES)
        try:
            change(state)
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
            continue  # a step over state that an earlier change has made useless
        found: list[Any] = []
        for known in (kept, None):
            try:
                found.append(_described(capture(state, number, kept=known)))
            except UnsupportedValue as error:
                found.append(str(error))
        assert found[0] == found[1]
        if isinstance(found[0], str):  # most often a parameter that was replaced
            _new_optimizer(torch.optim.AdamW)(state)
            _step(state)


def test_a_state_that_stays_is_recognised_and_keeps_its_tree() -> None:
    state, kept = _state(), KeptCaptures()
    _step(state)
    first = capture(state, 1, kept=kept).components[1]
    _step(state)
    second = capture(state, 2, kept=kept).components[1]
    assert isinstance(first.tree, dict)
    assert isinstance(second.tree, dict)
    assert second.tree["state"] is first.tree["state"]
    assert [id(one.spec) for one in second.pieces] == [id(one.spec) for one in first.pieces]


def test_what_is_kept_keeps_no_tensor_alive() -> None:
    state, kept = _state(), KeptCaptures()
    _step(state)
    capture(state, 1, kept=kept)
    capture(state, 2, kept=kept)
    gone = [weakref.ref(one) for one in state["model"].parameters()]
    gone += [weakref.ref(one) for entry in state["optimizer"].state.values() for one in entry.values()]
    state.clear()
    gc.collect()
    assert not [one for one in gone if one() is not None]


def test_a_sparse_tensor_that_takes_the_place_of_a_plain_one_is_refused() -> None:
    state, kept = _state(), KeptCaptures()
    _step(state)
    capture(state, 1, kept=kept)
    entry = _entry(state)
    entry["exp_avg"] = torch.zeros(entry["exp_avg"].shape).to_sparse()
    with pytest.raises(UnsupportedValue, match="exp_avg"):
        capture(state, 2, kept=kept)


def test_a_tensor_that_moves_to_another_parameters_state_is_seen() -> None:
    weights = nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    state: dict[str, Any] = {"model": weights, "optimizer": torch.optim.SGD(weights.parameters())}
    kept, (first, second) = KeptCaptures(), weights
    entries = state["optimizer"].state
    entries[first], entries[second] = {"a": torch.zeros(2), "b": torch.zeros(2)}, {"c": torch.zeros(2)}
    capture(state, 1, kept=kept)
    entries[second] = {"b": entries[first].pop("b"), **entries[second]}
    assert _described(capture(state, 2, kept=kept)) == _described(capture(state, 2))
