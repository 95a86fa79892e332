"""A tensor, an object with a state of its own and plain data take what was stored of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.read.scatter import Window
from asyncckpt.restore.plan import (
    LiveTarget,
    Options,
    RestorePlan,
    StoredTensors,
    decode_like,
    find_tensor,
    load,
    mismatch,
    new_tensors,
    on_host,
)
from asyncckpt.restore.wrappers import fill_or_note
from asyncckpt.state.capture import kind_of
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor, job_size
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.markers import LocalShard, with_shards, without_shards
from asyncckpt.state.rng import RngState
from asyncckpt.types import JsonValue


def plan_tensor(name: str, value: torch.Tensor, stored: StoredTensors, tree: JsonValue, opts: Options) -> RestorePlan:
    if isinstance(tree, dict) and tree.get("$") == "wrapper":
        plan = RestorePlan()
        tensors, arrays = new_tensors(name, stored, plan, opts), on_host(name, stored, plan)
        decode_like(name, tree, value, tensors, arrays, plan, wrappers=fill_or_note(name, stored, plan))
        return plan
    record = find_tensor(name, "value", stored, RestorePlan())
    problem = mismatch(name, record, value, opts)
    if problem:
        return RestorePlan(mismatched=[problem])
    plan = RestorePlan()
    plan.add(record, value, name)
    return plan


def plan_tree(
    name: str, value: Any, state: Mapping[str, Any], stored: StoredTensors, tree: JsonValue, opts: Options
) -> RestorePlan:
    """Plan a component of plain values. A stateful object gets them through ``load_state_dict``. Plain data is replaced
    in ``state``, and a container is refilled in place, so that whoever else holds it sees the new values."""
    plan = RestorePlan()
    if not opts.selected(name):
        return plan
    live: dict[str, torch.Tensor] = {}
    shards: dict[int, LocalShard] = {}
    # an object is asked for its state only where parts of it may lie on other ranks, or where it has types to give
    asked = kind_of(value) == "stateful" and (job_size() > 1 or jsontree.needs_live(tree))
    holder = value.state_dict() if asked else value
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
            window = Window(shard.tensor, shard.offsets[0] * width)
            plan.fill.append(LiveTarget(record, window, f"{name}.{key}"))
            return shard.tensor
        if found is None or mismatch(key, record, found, opts):
            return fresh(key)
        find_tensor(name, key, stored, plan)
        plan.add(record, found, f"{name}.{key}")
        return found

    wrappers = fill_or_note(name, stored, plan, plain=kind_of(value) == "plain")
    arrays = on_host(name, stored, plan)
    decoded = with_shards(decode_like(name, tree, bare, tensors, arrays, plan, wrappers=wrappers), shards)
    if isinstance(value, RngState):
        plan.missing += value.lacking(decoded, name)
    if kind_of(value) == "stateful":
        if not plan.missing:
            plan.finish.append(lambda: load(name, lambda: value.load_state_dict(decoded)))
    elif not _can_replace(state, value, decoded):
        plan.mismatched.append(
            f"{name}: a {type(value).__name__} cannot be put into a state that is a {type(state).__name__}; give the "
            f"state as a dict"
        )
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


def _can_replace(state: Mapping[str, Any], live: Any, decoded: Any) -> bool:
    """Return whether ``_replace_plain`` has a place to put the decoded data."""
    return isinstance(state, dict) or (type(live) is type(decoded) and type(live) in (dict, list))


def _replace_plain(name: str, state: Mapping[str, Any], live: Any, decoded: Any) -> None:
    """Put decoded plain data in the place of the live data."""
    if type(live) is dict and type(decoded) is dict:
        live.clear()
        live.update(decoded)
    elif type(live) is list and type(decoded) is list:
        live[:] = decoded
    elif isinstance(state, dict):
        state[name] = decoded
