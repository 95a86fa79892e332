"""An optimizer's state is stored under the names of its parameters, not under their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from asyncckpt.errors import UnsupportedValue
from asyncckpt.state.zero_redundancy import local_optimizer
from asyncckpt.types import JsonValue, LocalTensor


def named_optimizer_state(
    component: str, optimizer: torch.optim.Optimizer, owners: Mapping[int, tuple[str, str]], state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the optimizer's ``state_dict`` keyed by parameter name, and the names by torch's parameter index.

    ``component`` is the optimizer's name in ``state``; ``owners`` comes from ``parameter_names``. Raises
    ``UnsupportedValue`` for a parameter that belongs to no component of the state: without a name its state could only
    be matched by position, which breaks silently when the model changes.
    """
    local = local_optimizer(component, optimizer)
    raw = local.state_dict()
    names = optimizer_names(component, local, owners, state, whole=optimizer)
    by_name = {names.get(key, key): value for key, value in raw["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in raw["param_groups"]]
    return {**raw, "state": by_name, "param_groups": groups}, names


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
) -> dict[int, str]:
    """Map torch's parameter index to the name of each parameter of the optimizer, in ``state_dict`` order. ``whole``:
    the optimizer that this one has a part of the parameters of, on every rank another. Raises ``UnsupportedValue`` as
    ``named_optimizer_state`` does."""
    tensors = {id(value): name for name, value in state.items() if isinstance(value, torch.Tensor)}
    parameters: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameters.setdefault(id(parameter), parameter)
    everything = [id(parameter) for group in (whole or optimizer).param_groups for parameter in group["params"]]
    holders = {owners[key][0] for key in everything if key in owners}
    names: dict[int, str] = {}
    for index, key in enumerate(parameters):
        if key in owners:
            holder, fqn = owners[key]
            # two modules of one optimizer may use the same name
            names[index] = fqn if len(holders) == 1 else f"{holder}/{fqn}"
        elif key in tensors:
            names[index] = tensors[key]
        else:
            shape = tuple(parameters[key].shape)
            raise UnsupportedValue(
                f"state[{component!r}]: parameter number {index} (shape {shape}) belongs to no component of the "
                f"state, so it has no name. Add the module or tensor it comes from to the state"
            )
    return names
