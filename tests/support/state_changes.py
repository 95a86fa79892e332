"""Changes of a training state between two captures, to which the second one must not be blind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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


def new_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Model()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "other": {"x": torch.zeros(3)}}


def model_of(state: dict[str, Any]) -> Any:
    model = state["model"]
    return model.module if isinstance(model, nn.DataParallel) else model


def step(state: dict[str, Any]) -> None:
    state["optimizer"].zero_grad()
    for group in state["optimizer"].param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    state["optimizer"].step()


def entry_of(state: dict[str, Any]) -> dict[Any, Any]:
    """Return the optimizer's state of one parameter that has some."""
    found = [entry for entry in state["optimizer"].state.values() if entry]
    return found[0] if found else {}


def _tie(state: dict[str, Any]) -> None:
    model = model_of(state)
    model.head.weight = model.first.weight


def _untie(state: dict[str, Any]) -> None:
    model = model_of(state)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _share_memory(state: dict[str, Any]) -> None:
    model = model_of(state)
    model.head.weight.data = model.first.weight.data.t()


def new_optimizer(kind: Callable[..., Any], **options: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["optimizer"] = kind([p for p in state["model"].parameters() if p.requires_grad], lr=1e-3, **options)

    return change


def _made_anew(state: dict[str, Any]) -> None:
    loaded = state["optimizer"].state_dict()
    new_optimizer(type(state["optimizer"]))(state)
    state["optimizer"].load_state_dict(loaded)


def _rename_key(state: dict[str, Any]) -> None:
    entry = entry_of(state)
    if "exp_avg" in entry:
        entry["average"] = entry.pop("exp_avg")


def _other_key_type(state: dict[str, Any]) -> None:
    entry = entry_of(state)
    if "exp_avg_sq" in entry:
        entry[_Name("exp_avg_sq")] = entry.pop("exp_avg_sq")


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        entry = entry_of(state)
        if key in entry:
            entry[key] = value(entry[key]) if callable(value) else value

    return change


def _freeze(on: bool) -> Callable[[dict[str, Any]], None]:
    return lambda state: model_of(state).body.requires_grad_(not on) and None


def _wrap(state: dict[str, Any]) -> None:
    state["model"] = nn.DataParallel(model_of(state))


def _unwrap(state: dict[str, Any]) -> None:
    state["model"] = model_of(state)


def _buffer(value: torch.Tensor, *, persistent: bool = True) -> Callable[[dict[str, Any]], None]:
    return lambda state: model_of(state).register_buffer("extra", value.clone(), persistent=persistent)


def _swap_data(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        weight = model_of(state).body[0].weight
        weight.grad = None
        weight.data = value(weight.data)

    return change


def _weight(state: dict[str, Any]) -> Any:
    return model_of(state).first.weight


def drops_bias(module: nn.Module, values: dict[str, Any], prefix: str, *_: Any) -> None:
    values.pop(f"{prefix}head.bias", None)


def _group(state: dict[str, Any]) -> None:
    model = model_of(state)
    if not hasattr(model, "grown"):
        model.grown = nn.Linear(2, 2)
        state["optimizer"].add_param_group({"params": list(model.grown.parameters()), "lr": torch.tensor(0.1)})


CHANGES: list[Callable[[dict[str, Any]], None]] = [
    step,
    step,
    step,
    _tie,
    _untie,
    _share_memory,
    new_optimizer(torch.optim.AdamW),
    new_optimizer(torch.optim.SGD),
    new_optimizer(torch.optim.SGD, momentum=0.9),
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
    lambda state: _weight(state).data.t_() and None,
    lambda state: setattr(_weight(state), "data", _weight(state).data.t()),
    lambda state: setattr(_weight(state), "data", _weight(state).data.view(torch.int32).view(torch.float32)),
    lambda state: _weight(state).requires_grad_(not _weight(state).requires_grad) and None,
    lambda state: model_of(state).register_state_dict_post_hook(drops_bias) and None,
    lambda state: model_of(state).first._state_dict_hooks.clear(),
    lambda state: model_of(state)._state_dict_hooks.clear(),
    lambda state: setattr(model_of(state).first, "state_dict", nn.Identity().state_dict),
    lambda state: delattr(model_of(state).first, "state_dict"),
    lambda state: model_of(state).body._modules.update({"0": None}),
    lambda state: state.update(twin=model_of(state).body),
    lambda state: state.pop("twin", None),
    lambda state: state.update(other={"x": torch.zeros(4)}),
    lambda state: state["optimizer"].param_groups[0].update(lr=torch.tensor(0.5)),
    lambda state: state["optimizer"].param_groups[0].update(lr=0.25, note=["a"]),
    lambda state: setattr(model_of(state), "more", _Extra()),
    lambda state: delattr(model_of(state), "more"),
    lambda state: delattr(model_of(state), "more"),
    lambda state: delattr(model_of(state), "extra"),
    lambda state: setattr(model_of(state), "renamed", model_of(state)._modules.pop("grown")),
    lambda state: state.pop("other", None),
]


def described(snapshot: Snapshot) -> list[Any]:
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
