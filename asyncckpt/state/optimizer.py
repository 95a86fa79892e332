"""An optimizer's state is stored under the names of its parameters, not under their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import UnsupportedValue


def named_optimizer_state(
    component: str, optimizer: torch.optim.Optimizer, owners: Mapping[int, tuple[str, str]], state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the optimizer's ``state_dict`` keyed by parameter name, and the names by torch's parameter index.

    ``component`` is the optimizer's name in ``state``; ``owners`` comes from ``parameter_names``. Raises
    ``UnsupportedValue`` for a parameter that belongs to no component of the state: without a name its state could only
    be matched by position, which breaks silently when the model changes.
    """
    raw = optimizer.state_dict()
    names = optimizer_names(component, optimizer, owners, state)
    by_name = {names.get(key, key): value for key, value in raw["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in raw["param_groups"]]
    return {**raw, "state": by_name, "param_groups": groups}, names


def optimizer_names(
    component: str, optimizer: torch.optim.Optimizer, owners: Mapping[int, tuple[str, str]], state: Mapping[str, Any]
) -> dict[int, str]:
    """Map torch's parameter index to the name of each parameter of the optimizer, in ``state_dict`` order. Raises
    ``UnsupportedValue`` as ``named_optimizer_state`` does."""
    tensors = {id(value): name for name, value in state.items() if isinstance(value, torch.Tensor)}
    parameters: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameters.setdefault(id(parameter), parameter)
    holders = {owners[key][0] for key in parameters if key in owners}
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


def wrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that this one hands everything on to, as Accelerate's does, or itself."""
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
        return optimizer
    if getattr(optimizer, "state", None) is not inner.state or optimizer.param_groups is not inner.param_groups:
        return optimizer
    return wrapped_optimizer(inner)
