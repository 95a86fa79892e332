"""Adapters say where stored tensors go in the live state: one for each kind of component that ``state`` captures.

An adapter first makes a plan and touches nothing. Bytes are then read into the plan's targets, and the plan's
``finish`` hands over what is not filled in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncckpt.manifest.records import ComponentRecord
from asyncckpt.restore.modules import plan_module
from asyncckpt.restore.optimizers import plan_optimizer
from asyncckpt.restore.plan import Options, RestorePlan, StoredTensors
from asyncckpt.restore.saved_parameters import SavedParameters
from asyncckpt.restore.trees import plan_tensor, plan_tree
from asyncckpt.restore.wrappers import StoredWrappers
from asyncckpt.state.capture import kind_of
from asyncckpt.types import JsonValue


def plan_component(
    name: str,
    state: Mapping[str, Any],
    record: ComponentRecord | None,
    stored: StoredTensors,
    tree: JsonValue,
    saved: SavedParameters,
    wrappers: StoredWrappers,
    opts: Options,
) -> RestorePlan:
    """Plan the restore of one live component. ``record`` and ``tree``: the checkpoint's component of that name, and its
    plain values, if there are any. ``saved`` knows the stored parameters, for optimizers, and ``wrappers`` what
    was stored of wrapping tensors, for modules."""
    value = state[name]
    kind = kind_of(value)
    if kind == "module":
        extras = tree if record is not None and record.kind == "module" else {}
        return plan_module(name, value, record, stored, extras, wrappers, opts)
    if record is None:
        return RestorePlan(missing=[name])
    if kind == "optimizer" and record.kind in ("optimizer", "stateful"):
        return plan_optimizer(name, value, state, record, tree, saved, opts)
    if record.kind != kind:
        return RestorePlan(mismatched=[f"{name}: saved as {record.kind}, live as {kind}"])
    if kind == "tensor":
        return plan_tensor(name, value, stored, tree, opts)
    return plan_tree(name, value, state, stored, tree, opts)
