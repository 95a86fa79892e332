"""An optimizer takes its stored state by the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.read.scatter import Window
from asyncckpt.restore.plan import (
    Options,
    RestorePlan,
    StoredTensors,
    decode,
    find_tensor,
    load,
    mismatch,
    new_tensor,
    on_host,
)
from asyncckpt.state.dtensor import is_distributed, like
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.fqn import parameter_names
from asyncckpt.state.optimizer import optimizer_names
from asyncckpt.types import JsonValue


def plan_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    stored: StoredTensors,
    tree: JsonValue,
    opts: Options,
) -> RestorePlan:
    plan = RestorePlan()
    if not opts.selected(name):
        return plan
    group_trees = tree.get("param_groups") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not isinstance(group_trees, list):
        raise CheckpointDamaged(f"component {name!r} was saved as an optimizer and does not look like one")
    owners = parameter_names({key: value for key, value in state.items() if isinstance(value, nn.Module)})
    names = optimizer_names(name, optimizer, owners, state)
    index_of = {fqn: index for index, fqn in names.items()}
    parameters = _parameters(optimizer)
    lives = optimizer.param_groups if len(optimizer.param_groups) == len(group_trees) else [None] * len(group_trees)
    saved_groups = [decode(name, group, stored, plan, opts, lives[at]) for at, group in enumerate(group_trees)]
    if not all(_is_group(group) for group in saved_groups):
        raise CheckpointDamaged(f"component {name!r}: a param group of it does not look like one")
    saved_names = {fqn for group in saved_groups for fqn in group["params"]}
    plan.missing += [f"{name}.{fqn}" for fqn in index_of if fqn not in saved_names]
    plan.unexpected += [f"{name}.{fqn}" for fqn in saved_names if fqn not in index_of]
    if len(saved_groups) != len(optimizer.param_groups):
        plan.mismatched.append(
            f"{name}: {len(saved_groups)} param groups saved, {len(optimizer.param_groups)} in the live optimizer"
        )
    values: dict[int | str, Any] = {}
    saved_state = tree.get("state")
    if not isinstance(saved_state, dict) or "$" in saved_state:
        raise CheckpointDamaged(f"component {name!r}: its state is not keyed by parameter name")
    for key, subtree in saved_state.items():
        index = index_of.get(key)
        if index is None:
            if key not in saved_names:  # an optimizer may keep state that is no parameter's
                values[key] = decode(name, subtree, stored, plan, opts)
            continue
        live = optimizer.state.get(parameters[index], {})
        tensors = _state_tensors(name, parameters[index], live, stored, plan, opts)
        values[index] = jsontree.decode(subtree, tensors, on_host(name, stored, plan))
    groups: list[dict[str, Any]] = []
    counted = 0
    for live_group in optimizer.param_groups:
        indexes = list(range(counted, counted + len(live_group["params"])))
        counted += len(indexes)
        group_names = {names[index] for index in indexes}
        source = max(saved_groups, key=lambda g: len(group_names.intersection(g["params"])), default=None)
        base = {key: value for key, value in live_group.items() if key != "params"}
        if source is not None and group_names.intersection(source["params"]):
            base.update({key: value for key, value in source.items() if key != "params"})
        groups.append({**base, "params": indexes})
    others = {k: decode(name, v, stored, plan, opts) for k, v in tree.items() if k not in _TORCH_KEYS}
    loaded = {**others, "state": values, "param_groups": groups}
    plan.finish.append(lambda: load(name, lambda: optimizer.load_state_dict(loaded)))
    return plan


def _is_group(group: Any) -> bool:
    """Whether a decoded value has the form of an optimizer's param group."""
    names = group.get("params") if type(group) is dict else None
    return type(names) is list and all(type(name) is str for name in names)


_TORCH_KEYS = frozenset({"state", "param_groups"})


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List the parameters in the order of torch's indexes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_tensors(
    component: str,
    parameter: torch.Tensor,
    live: Any,
    stored: StoredTensors,
    plan: RestorePlan,
    opts: Options,
) -> Callable[[str], torch.Tensor]:
    """Return a function that gives, for a key of a parameter's state, the live tensor where it fits, and else a new one
    on the parameter's device."""

    def get(key: str) -> torch.Tensor:
        record = find_tensor(component, key, stored, plan)
        found = live.get(key.rpartition(".")[2]) if isinstance(live, dict) else None
        usable = isinstance(found, torch.Tensor) and not mismatch(key, record, found, opts) and not found.is_meta
        if is_distributed(parameter) and record.shape == tuple(parameter.shape):
            fits = usable and is_distributed(found)
            made: torch.Tensor = found if fits and found is not None else like(parameter, DTYPES[record.dtype])
            plan.add(record, made, f"{component}.{key}")
            return made
        if not usable or not isinstance(found, torch.Tensor):
            device = parameter.device if record.shape == tuple(parameter.shape) else torch.device("cpu")
            if device.type == "meta":
                device = opts.device
            found = new_tensor(record, DTYPES[record.dtype], device)
        plan.fill.append((record, [Window(found)]))
        return found

    return get
