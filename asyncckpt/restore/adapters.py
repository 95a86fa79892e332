"""Adapters say where stored tensors go in the live state: one for each kind of component that ``state`` captures.

An adapter first makes a plan and touches nothing. Bytes are then read into the plan's targets, and the plan's
``finish`` hands over what is not filled in place.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, StateMismatch
from asyncckpt.manifest.records import ComponentRecord
from asyncckpt.read.scatter import Window
from asyncckpt.restore.param_groups import hyper_parameters, sources_of
from asyncckpt.restore.plan import (
    Options,
    RestorePlan,
    StoredTensors,
    decode,
    find_tensor,
    mismatch,
    new_tensor,
    new_tensors,
    on_host,
)
from asyncckpt.state.capture import kind_of
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor, job_size, like
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.fqn import canonical_names, parameter_names
from asyncckpt.state.markers import LocalShard, with_shards, without_shards
from asyncckpt.state.optimizer import optimizer_names
from asyncckpt.state.zero_redundancy import after_restore, local_optimizer
from asyncckpt.types import JsonValue


def plan_component(
    name: str,
    state: Mapping[str, Any],
    record: ComponentRecord | None,
    stored: StoredTensors,
    tree: JsonValue,
    opts: Options,
) -> RestorePlan:
    """Plan the restore of one live component. ``record`` and ``tree``: the checkpoint's component of that name, and its
    plain values, if there are any."""
    value = state[name]
    kind = kind_of(value)
    if kind == "module":
        extras = tree if record is not None and record.kind == "module" else {}
        return _module(name, value, stored, extras, opts)
    if record is None:
        return RestorePlan(missing=[name])
    if record.kind != kind:
        return RestorePlan(mismatched=[f"{name}: saved as {record.kind}, live as {kind}"])
    if kind == "optimizer":
        return _optimizer(name, value, state, stored, tree, opts)
    if kind == "tensor":
        return _tensor(name, value, stored, opts)
    return _tree(name, value, state, stored, tree, opts)


def _module(name: str, module: nn.Module, stored: StoredTensors, extras: JsonValue, opts: Options) -> RestorePlan:
    plan = RestorePlan()
    live = module.state_dict()
    fqns = canonical_names(module, live)
    own = {
        t.untyped_storage().data_ptr()
        for t in (*module.parameters(), *module.buffers())
        if not t.is_meta and not is_distributed(t)
    }
    extra_fill = RestorePlan()
    extra_values = decode(name, extras, stored, extra_fill, opts) if extras else {}
    if not isinstance(extra_values, dict):
        raise CheckpointDamaged(f"component {name!r} was saved as a module and does not look like one")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    by_memory = _aliases(live, fqns, parameters)
    later: dict[str, Any] = {}
    meta: dict[str, torch.Tensor] = {}
    wanted: set[str] = set()
    for raw, value in live.items():
        qualified = f"{name}.{fqns[raw]}"
        if not opts.selected(qualified):
            continue
        wanted.add(qualified)
        if not isinstance(value, torch.Tensor) and not is_sharded_tensor(value):
            if fqns[raw] in extra_values:
                later[raw] = extra_values[fqns[raw]]
                plan.fill += extra_fill.fill
                extra_fill.fill = []
            else:
                plan.missing.append(qualified)
            continue
        record = stored.get(qualified)
        if record is None:
            # a tied tensor is stored under the name of the one it is tied to
            if not any(f"{name}.{twin}" in stored for twin in by_memory.get(raw, ())):
                plan.missing.append(qualified)
            continue
        problem = mismatch(qualified, record, value, opts)
        if problem:
            plan.mismatched.append(problem)
            continue
        if is_distributed(value) or is_sharded_tensor(value):
            if value.device.type == "meta":
                plan.mismatched.append(f"{qualified}: on the meta device; call to_empty(device=...) on the model first")
            else:
                plan.add(record, value, qualified)
                if not is_distributed(parameters.get(raw)):  # FSDP1's state_dict gives copies: it must take them back
                    later[raw] = value
            continue
        target = value
        if value.is_meta:
            dtype = opts.dtype if opts.dtype is not None and value.is_floating_point() else value.dtype
            target = meta[raw] = torch.empty(value.shape, dtype=dtype, device=opts.device)
        elif value.numel() and value.untyped_storage().data_ptr() not in own:
            later[raw] = value  # the module's state_dict gives copies (hooks, packed weights): it must take them back
        plan.fill.append((record, [Window(target)]))
    wanted.update(f"{name}.{key}" for key in jsontree.tensor_names(extras))
    prefix = f"{name}."
    plan.unexpected += [key for key in stored if key.startswith(prefix) and key not in wanted and opts.selected(key)]
    if meta:
        plan.finish.append(lambda: _materialize(module, meta))
    if later:
        plan.finish.append(lambda: _load(name, lambda: module.load_state_dict(later, strict=False)))
    return plan


def _load(name: str, load: Callable[[], object]) -> None:
    """Hand over to torch what is not filled in place. A forged checkpoint may have all the right names, and hold
    nonsense that makes torch raise anything."""
    try:
        load()
    except Exception as error:
        raise StateMismatch(
            f"{name}: the live object does not take what was stored ({type(error).__name__}: {error}). It may be "
            f"partly overwritten: restore another checkpoint"
        ) from error


def _aliases(
    live: Mapping[str, Any], fqns: Mapping[str, str], parameters: Mapping[str, torch.Tensor]
) -> dict[str, list[str]]:
    """Map each raw name to the FQNs of the other live tensors in the same memory."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for raw, value in live.items():
        if not isinstance(value, torch.Tensor):
            continue
        if is_distributed(value) or is_sharded_tensor(value):
            # this rank's part may be empty and have no memory: the parameter tells them apart
            groups.setdefault((id(parameters.get(raw)),), []).append(raw)
        elif value.numel() and not value.is_meta:
            groups.setdefault((value.data_ptr(), value.shape, value.stride(), value.device), []).append(raw)
    return {raw: [fqns[other] for other in group if other != raw] for group in groups.values() for raw in group}


def _materialize(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give tensors on the meta device their storage. They are swapped in place: ties and optimizers keep their
    objects."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors
    done: set[int] = set()
    for raw, value in values.items():
        if raw in parameters:
            live = parameters[raw]
            if id(live) not in done:
                swap(live, nn.Parameter(value, requires_grad=live.requires_grad))
                done.add(id(live))
        elif raw in buffers:
            owner = module.get_submodule(raw.rpartition(".")[0])
            owner._buffers[raw.rpartition(".")[2]] = value


def _optimizer(
    name: str,
    given: torch.optim.Optimizer,
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
    optimizer = local_optimizer(name, given)
    names = optimizer_names(name, optimizer, owners, state, whole=given)
    index_of = {fqn: index for index, fqn in names.items()}
    parameters = _parameters(optimizer)
    saved_groups = [decode(name, group, stored, plan, opts) for group in group_trees]
    if not all(_is_group(group) for group in saved_groups):
        raise CheckpointDamaged(f"component {name!r}: a param group of it does not look like one")
    saved_names = {fqn for group in saved_groups for fqn in group["params"]}
    plan.missing += [f"{name}.{fqn}" for fqn in index_of if fqn not in saved_names]
    plan.unexpected += [f"{name}.{fqn}" for fqn in saved_names if fqn not in index_of]
    if len(saved_groups) != len(optimizer.param_groups) and opts.saved_ranks == job_size() == 1:
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
    starts = [0, *itertools.accumulate(len(group["params"]) for group in optimizer.param_groups)]
    indexes = [list(range(*edges)) for edges in itertools.pairwise(starts)]
    sources, differing = sources_of(name, [[names[index] for index in group] for group in indexes], group_trees)
    plan.mismatched += differing
    for number, (live_group, source) in enumerate(zip(optimizer.param_groups, sources, strict=True)):
        saved = hyper_parameters(saved_groups[source]) if source is not None else {}
        groups.append({**hyper_parameters(live_group), **saved, "params": indexes[number]})
        if source in sources[:number]:  # its tensors must not be those of the other live group
            plan.finish.append(functools.partial(_copy_tensors, groups[-1]))
    others = {k: decode(name, v, stored, plan, opts) for k, v in tree.items() if k not in _TORCH_KEYS}
    loaded = {**others, "state": values, "param_groups": groups}
    plan.finish.append(lambda: _load(name, lambda: optimizer.load_state_dict(loaded)))
    plan.finish.append(lambda: after_restore(given))
    return plan


def _copy_tensors(group: dict[str, Any]) -> None:
    """Give a group tensors of its own."""
    group.update({key: value.clone() for key, value in group.items() if isinstance(value, torch.Tensor)})


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


def _tensor(name: str, value: torch.Tensor, stored: StoredTensors, opts: Options) -> RestorePlan:
    record = find_tensor(name, "value", stored, RestorePlan())
    problem = mismatch(name, record, value, opts)
    if problem:
        return RestorePlan(mismatched=[problem])
    plan = RestorePlan()
    plan.add(record, value, name)
    return plan


def _tree(
    name: str, value: Any, state: Mapping[str, Any], stored: StoredTensors, tree: JsonValue, opts: Options
) -> RestorePlan:
    """Plan a component of plain values. A stateful object gets them through ``load_state_dict``. Plain data is replaced
    in ``state``, and a container is refilled in place, so that whoever else holds it sees the new values."""
    plan = RestorePlan()
    if not opts.selected(name):
        return plan
    live: dict[str, torch.Tensor] = {}
    shards: dict[int, LocalShard] = {}
    # an object is asked for its state only where parts of it may lie on other ranks
    holder = value.state_dict() if kind_of(value) == "stateful" and job_size() > 1 else value
    bare = without_shards(holder, shards)
    if kind_of(value) == "plain" or shards or (holder is not value and _has_distributed(holder)):
        jsontree.encode(bare, "", live.__setitem__, component=name)
    fresh = new_tensors(name, stored, plan, opts)

    def tensors(key: str) -> torch.Tensor:
        found = live.get(key)
        record = stored.get(f"{name}.{key}")
        if record is None:
            return fresh(key)
        shard = shards.get(id(found))
        if shard is not None:
            find_tensor(name, key, stored, plan)
            shape = tuple(shard.global_shape)
            if shape != record.shape or DTYPES[record.dtype] != shard.tensor.dtype:
                plan.mismatched.append(f"{name}.{key}: saved as {record.dtype} {list(record.shape)}, live {shard}")
            width = math.prod(shape[1:])
            plan.fill.append((record, [Window(shard.tensor, shard.offsets[0] * width)]))
            return shard.tensor
        if found is None or mismatch(key, record, found, opts):
            return fresh(key)
        find_tensor(name, key, stored, plan)
        plan.add(record, found, f"{name}.{key}")
        return found

    decoded = with_shards(jsontree.decode(tree, tensors, on_host(name, stored, plan)), shards)
    if kind_of(value) == "stateful":
        plan.finish.append(lambda: value.load_state_dict(decoded))
    else:
        plan.finish.append(lambda: _replace_plain(name, state, value, decoded))
    return plan


def _has_distributed(value: Any) -> bool:
    """Whether a DTensor or ShardedTensor lies anywhere in nested containers."""
    if type(value) is dict:
        return any(_has_distributed(item) for item in value.values())
    if type(value) in (list, tuple):
        return any(_has_distributed(item) for item in value)
    return is_distributed(value) or is_sharded_tensor(value)


def _replace_plain(name: str, state: Mapping[str, Any], live: Any, decoded: Any) -> None:
    """Put decoded plain data in the place of the live data."""
    if type(live) is dict and type(decoded) is dict:
        live.clear()
        live.update(decoded)
    elif type(live) is list and type(decoded) is list:
        live[:] = decoded
    elif isinstance(state, dict):
        state[name] = decoded
