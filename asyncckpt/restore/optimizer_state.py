"""Chooses the tensors that take an optimizer's stored state: live ones where they fit, and else new ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from asyncckpt.jsontree import Wrapper
from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.memory.tensor_bytes import is_dense, may_overlap
from asyncckpt.read.scatter import Window
from asyncckpt.restore.live_memory import refusal
from asyncckpt.restore.optimizer_load import tensor_class
from asyncckpt.restore.plan import (
    LiveTarget,
    Options,
    RestorePlan,
    StoredTensors,
    find_tensor,
    mismatch,
    new_tensor,
    not_saved,
)
from asyncckpt.restore.saved_parameters import SavedParameter, same_strides, saved_strides
from asyncckpt.restore.wrappers import DoesNotFit, fill_or_make, make_wrapper
from asyncckpt.state.dtensor import is_distributed, like
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.fsdp1 import FlatPart
from asyncckpt.state.wrappers import hides_values


class StateTargets:
    """Makes the targets of one optimizer's state. ``component`` is its stored record, ``stored`` has its tensors by
    their qualified names, and ``live_format`` returns the strides that a live parameter will have once its module is
    restored."""

    def __init__(
        self,
        name: str,
        component: ComponentRecord,
        stored: StoredTensors,
        opts: Options,
        live_format: Callable[[SavedParameter | None, torch.Tensor], tuple[int, ...]],
    ) -> None:
        self._name = name
        self._component = component
        self._stored = stored
        self._opts = opts
        self._live_format = live_format

    def of_parameter(
        self,
        parameter: torch.Tensor,
        saved: SavedParameter | None,
        live: Any,
        prefix: str,
        group: Mapping[str, Any],
        plan: RestorePlan,
        part: FlatPart | None = None,
    ) -> Callable[[str], torch.Tensor]:
        """Return a function that gives the target of a tensor of a parameter's state, by its stored name, and adds it
        to ``plan``. ``saved``: the parameter as it was stored. ``live``: its state now, whose tensors are named like
        stored ones after ``prefix``. ``group``: the hyperparameters it will have.
        ``part``: which elements of the parameter this rank has, where it has no whole rows."""
        there = tensors_in(live, prefix)

        def get(key: str) -> torch.Tensor:
            record = find_tensor(self._name, key, self._stored, plan)
            found = there.get(key)
            if found is not None and hides_values(found):
                raise DoesNotFit(f"{key}: {not_saved(record, found)}")
            like_parameter = record.shape == tuple(parameter.shape)
            dtype = self._dtype(record, parameter, saved)
            usable = found is not None and not found.is_meta and _same(record, dtype, found)
            if is_distributed(parameter) and like_parameter:
                made: torch.Tensor = (
                    found if usable and found is not None and is_distributed(found) else like(parameter, dtype)
                )
                plan.add(record, made, f"{self._name}.{key}", new=made is not found)
                return made
            if part is not None and record.shape == part.shape and record.shape:
                return self._part(key, record, dtype, found, parameter, part, plan)
            strides = self._strides(key, record, parameter, saved)
            if found is not None and usable and not is_distributed(found) and lies_as(found, strides):
                plan.add(record, found, f"{self._name}.{key}")
                return found
            device = found.device if found is not None else self._device(key, prefix, parameter, group)
            found = new_tensor(record, dtype, self._opts.device if device.type == "meta" else device, strides)
            plan.add(record, found, f"{self._name}.{key}", new=True)
            return found

        return get

    def _part(
        self,
        key: str,
        record: StoredTensor,
        dtype: torch.dtype,
        found: torch.Tensor | None,
        parameter: torch.Tensor,
        part: FlatPart,
        plan: RestorePlan,
    ) -> torch.Tensor:
        """Return what takes this rank's elements of a tensor of state: the live ones, where they fit."""
        where = f"{self._name}.{key}"
        if (
            found is not None
            and refusal(found) is None
            and tuple(found.shape) == (part.count,)
            and found.dtype == dtype
        ):
            plan.fill.append(LiveTarget(record, Window(found, part.first), where))
            return found
        made = torch.empty(part.count, dtype=dtype, device=parameter.device)
        plan.read.append((record, [Window(made, part.first)]))
        return made

    def wrappers(
        self, optimizer: torch.optim.Optimizer, device: torch.device, plan: RestorePlan
    ) -> Callable[[Wrapper, Any, str], Any]:
        """Return a function that finds or makes the targets of tensors that wrap others. ``device``: where those that
        do not live yet are made."""

        def new(record: StoredTensor) -> torch.Tensor:
            return new_tensor(record, DTYPES[record.dtype], device)

        def record_of(key: str) -> StoredTensor:  # what is made is only then known to take it, and marked as used
            return find_tensor(self._name, key, self._stored, RestorePlan())

        def make(node: Wrapper) -> Any:
            return make_wrapper(node, functools.partial(tensor_class, optimizer), record_of, new)

        return fill_or_make(self._name, self._stored, plan, make)

    def elsewhere(
        self, live: Any, prefix: str, plan: RestorePlan, device: torch.device
    ) -> Callable[[str], torch.Tensor]:
        """Do what ``of_parameter`` does, for tensors that are no parameter's state. ``device``: where those that do not
        live yet, and have a dimension, are made."""
        there = tensors_in(live, prefix)

        def get(key: str) -> torch.Tensor:
            record = find_tensor(self._name, key, self._stored, plan)
            found = there.get(key)
            if found is not None and hides_values(found):
                raise DoesNotFit(f"{key}: {not_saved(record, found)}")
            strides = saved_strides(self._component, key, record.shape)
            if found is not None and not found.is_meta and not mismatch(key, record, found, self._opts):
                if is_distributed(found):
                    plan.add(record, found, f"{self._name}.{key}")
                    return found
                if lies_as(found, strides):
                    plan.add(record, found, f"{self._name}.{key}")
                    return found
            place = found.device if found is not None else device if record.shape else self._opts.device
            found = new_tensor(record, DTYPES[record.dtype], place, strides)
            plan.add(record, found, f"{self._name}.{key}", new=True)
            return found

        return get

    def _dtype(self, record: StoredTensor, parameter: torch.Tensor, saved: SavedParameter | None) -> torch.dtype:
        """Return the dtype that was stored. Only where ``restore(dtype=...)`` converts the parameter is state that had
        the parameter's dtype converted with it."""
        stored, wanted = DTYPES[record.dtype], self._opts.dtype
        if wanted is None or saved is None or saved.record.dtype != record.dtype or not stored.is_floating_point:
            return stored
        return wanted if parameter.is_meta or parameter.dtype == wanted else stored

    def _strides(
        self, key: str, record: StoredTensor, parameter: torch.Tensor, saved: SavedParameter | None
    ) -> tuple[int, ...] | None:
        """Return the strides that a tensor of state has to have: those it had, or, where it lay like its parameter,
        those that the parameter has now."""
        strides = saved_strides(self._component, key, record.shape)
        if record.shape != tuple(parameter.shape) or is_distributed(parameter):
            return strides
        if strides is not None and saved is not None and saved.strides is not None:
            if not same_strides(record.shape, strides, saved.strides):
                return strides
        elif strides is not None:
            return strides
        mine = self._live_format(saved, parameter)
        return mine if is_dense(record.shape, mine) else strides

    def _device(self, key: str, prefix: str, parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
        """Return the device that torch puts state on: the parameter's, but for the step of an optimizer that counts on
        the host."""
        on_device = group.get("capturable") or group.get("fused")
        return torch.device("cpu") if key == f"{prefix}.step" and not on_device else parameter.device


def _same(record: StoredTensor, dtype: torch.dtype, found: torch.Tensor) -> bool:
    return refusal(found) is None and record.shape == tuple(found.shape) and found.dtype == dtype


def lies_as(tensor: torch.Tensor, strides: tuple[int, ...] | None) -> bool:
    """Return whether a live tensor can take stored values in place: it has the strides that are wanted, or is a view
    with gaps, whose place in a larger tensor counts for more."""
    if may_overlap(tensor):
        return False
    if strides is None or not is_dense(tuple(tensor.shape), tensor.stride()):
        return True
    return same_strides(tuple(tensor.shape), tensor.stride(), strides)


def tensors_in(value: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors in nested dicts and lists by the names that ``jsontree.encode`` gives them."""
    found: dict[str, torch.Tensor] = {}
    stack: list[tuple[str, Any, int]] = [(prefix, value, 0)]
    while stack:
        path, here, depth = stack.pop()
        if isinstance(here, torch.Tensor):
            found.setdefault(path, here)
        elif depth < 20 and isinstance(here, dict):
            stack += [(f"{path}.{key}", item, depth + 1) for key, item in here.items()]
        elif depth < 20 and isinstance(here, list | tuple):
            stack += [(f"{path}.{index}", item, depth + 1) for index, item in enumerate(here)]
    return found
