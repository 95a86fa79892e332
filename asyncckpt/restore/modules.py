"""A module takes its stored tensors in place, and what its ``state_dict`` only copies through ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.read.scatter import Window
from asyncckpt.restore.plan import Options, RestorePlan, StoredTensors, decode, load, mismatch
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor
from asyncckpt.state.fqn import canonical_names
from asyncckpt.types import JsonValue


def plan_module(name: str, module: nn.Module, stored: StoredTensors, extras: JsonValue, opts: Options) -> RestorePlan:
    plan = RestorePlan()
    live = module.state_dict()
    fqns = canonical_names(module, live)
    own = {
        t.untyped_storage().data_ptr()
        for t in (*module.parameters(), *module.buffers())
        if not t.is_meta and not is_distributed(t)
    }
    extra_fill = RestorePlan()
    extra_lives = {fqns[raw]: value for raw, value in live.items() if opts.selected(f"{name}.{fqns[raw]}")}
    extra_values = decode(name, extras, stored, extra_fill, opts, extra_lives) if extras else {}
    plan.mismatched += extra_fill.mismatched
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
        plan.finish.append(lambda: load(name, lambda: module.load_state_dict(later, strict=False)))
    return plan


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
