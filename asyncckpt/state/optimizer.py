"""An optimizer's state is stored under the names of its parameters, not under their positions."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncckpt.errors import UnsupportedValue
from asyncckpt.jsontree.typed_values import attributes_beside_fields, is_dataclass
from asyncckpt.protocols import Stateful
from asyncckpt.state.zero_redundancy import local_optimizer
from asyncckpt.types import JsonValue, LocalTensor

#: What a parameter group has for each of its parameters; everything else in it holds for all of them.
BY_PARAMETER = ("params", "param_names")
#: The keys of the ``state_dict`` that torch's own optimizers have.
TORCH_KEYS = frozenset({"state", "param_groups"})


def named_optimizer_state(
    component: str, optimizer: torch.optim.Optimizer, owners: Mapping[int, tuple[str, str]], state: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the kind that the optimizer is stored as, and what is stored of it.

    The kind is ``optimizer`` where ``state_dict`` has the form that torch gives it: it is then keyed by parameter name.
    It is ``stateful`` where the class, such as one that wraps another optimizer, has a form of its own; that is stored
    as it is, with the parameters' names in their order beside it. ``component`` is the optimizer's name in ``state``;
    ``owners`` comes from ``parameter_names``. Raises ``UnsupportedValue`` for a parameter that belongs to no component
    of the state: without a name its state could only be matched by position, which breaks silently when the model
    changes.
    """
    local = local_optimizer(component, optimizer)
    raw = local.state_dict()
    names = [label for label, _, _ in optimizer_names(component, local, owners, state, whole=optimizer)]
    if not _is_torchs(raw, len(names)):
        return "stateful", {"state_dict": raw, "param_names": grouped(names, local)}
    by_name = {names[key] if _is_index(key, names) else key: value for key, value in raw["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in raw["param_groups"]]
    return "optimizer", {**raw, "state": by_name, "param_groups": groups}


def _is_index(key: Any, names: Sequence[str]) -> bool:
    return type(key) is int and 0 <= key < len(names)


def _is_torchs(raw: Any, count: int) -> bool:
    """Return whether a ``state_dict`` has the form that torch's own optimizers give it, for so many parameters."""
    if not isinstance(raw, dict) or not raw.keys() >= TORCH_KEYS:
        return False
    groups = raw["param_groups"]
    if not isinstance(raw["state"], dict) or not isinstance(groups, list):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    return [index for group in groups for index in group["params"]] == list(range(count))


def grouped(names: Sequence[str], optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of all parameters as one list for each of the optimizer's groups."""
    rest = iter(names)
    return [[next(rest) for _ in group["params"]] for group in optimizer.param_groups]


def group_parameters(tree: JsonValue) -> list[list[str]]:
    """Return the names of the parameters in each group of an encoded optimizer."""
    groups: Any = tree.get("param_groups") if isinstance(tree, dict) else None
    return [list(group["params"]) for group in groups or ()]


def rename_group_tensors(tree: JsonValue, pieces: Sequence[LocalTensor]) -> None:
    """Name the tensors in parameter groups (a learning rate that is a tensor, say) after the first parameter of their
    group, in the optimizer's tree and in its pieces: another rank's group of the same number may be another one."""
    groups: Any = tree.get("param_groups") if isinstance(tree, dict) else None
    held = {piece.spec.name: piece for piece in pieces if piece.spec.name.startswith("param_groups.")}
    for number, group in enumerate(groups if held else ()):
        stack = [value for key, value in group.items() if key != "params"] if group["params"] else []
        prefix = f"param_groups.{number}."
        while stack:
            node = stack.pop()
            if isinstance(node, list):
                stack += node
            elif isinstance(node, dict) and node.get("$") != "tensor":
                stack += node.values()
            elif isinstance(node, dict) and node["v"].startswith(prefix):
                piece = held[node["v"]]
                node["v"] = f"param_groups.{group['params'][0]}.{node['v'][len(prefix) :]}"
                piece.spec = replace(piece.spec, name=node["v"])


def optimizer_names(
    component: str,
    optimizer: torch.optim.Optimizer,
    owners: Mapping[int, tuple[str, str]],
    state: Mapping[str, Any],
    *,
    whole: torch.optim.Optimizer | None = None,
) -> list[tuple[str, str, str]]:
    """Return, for each parameter of the optimizer in the order of ``state_dict``, the name that its state is stored
    under, its component, and its FQN there, which is empty where the component is the tensor itself. ``whole``: the
    optimizer that this one has a part of the parameters of, on every rank another. Raises ``UnsupportedValue`` as
    ``named_optimizer_state`` does."""
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise UnsupportedValue(
            f"state[{component!r}]: {type(optimizer).__name__} has no param_groups, so nobody can tell whose state it "
            f"has. Put the optimizer that it wraps into the state"
        )
    tensors = {id(value): name for name, value in state.items() if isinstance(value, torch.Tensor)}
    parameters: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameters.setdefault(id(parameter), parameter)
    everything = [id(parameter) for group in (whole or optimizer).param_groups for parameter in group["params"]]
    holders = {owners[key][0] for key in everything if key in owners}
    names: list[tuple[str, str, str]] = []
    for index, (key, parameter) in enumerate(parameters.items()):
        if key in owners:
            holder, fqn = owners[key]
            # two modules of one optimizer may use the same name
            names.append((fqn if len(holders) == 1 else f"{holder}/{fqn}", holder, fqn))
        elif key in tensors:
            names.append((tensors[key], tensors[key], ""))
        else:
            raise UnsupportedValue(_nameless(component, index, parameter, parameters, state))
    return names


def _nameless(
    component: str, index: int, lost: torch.Tensor, trained: Mapping[int, torch.Tensor], state: Mapping[str, Any]
) -> str:
    """Say that a parameter of an optimizer belongs to nothing in the state, and what may have taken its place."""
    problem = (
        f"state[{component!r}]: parameter number {index} (shape {tuple(lost.shape)}) belongs to no component of the "
        f"state, so it has no name. "
    )
    twins = [
        f"{name}.{fqn}"
        for name, module in state.items()
        if isinstance(module, nn.Module)
        for fqn, parameter in module.named_parameters()
        if id(parameter) not in trained and not _is_lazy(parameter) and parameter.shape == lost.shape
    ]
    if not twins:
        return problem + "Add the module or tensor it comes from to the state"
    return problem + (
        f"{twins[0]} has its shape, and this optimizer does not train that: if a new nn.Parameter was assigned there, "
        f"the optimizer goes on with the one that was replaced. Change values in place instead "
        f"(with torch.no_grad(): parameter.copy_(new)), or make the optimizer after the parameter. If they are "
        f"unrelated, add the module or tensor it comes from to the state"
    )


def _is_lazy(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def object_state(value: Any) -> tuple[str, Any] | None:
    """Return the class's name and the state of an object in an optimizer's state: what its ``state_dict`` returns, a
    dataclass's fields, or the value of a member of an enumeration. Return None for any other object, and for a
    dataclass with attributes that are no fields, which would be lost."""
    if isinstance(value, type):
        return None
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Stateful):
        return name, value.state_dict()
    if isinstance(value, enum.Enum):
        return name, value.value
    if is_dataclass(value) and not attributes_beside_fields(value):
        return name, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def wrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that this one hands everything on to, as Accelerate's does, or itself."""
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
        return optimizer
    if any(getattr(optimizer, key, None) is not getattr(inner, key) for key in ("state", "param_groups")):
        return optimizer
    return wrapped_optimizer(inner)
