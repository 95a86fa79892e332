"""Planted bugs: what is restored is not what was handed over."""

from __future__ import annotations

import re
from typing import Any

import torch

from asyncckpt.manifest.records import ComponentRecord
from asyncckpt.restore import modules, optimizer_load, optimizer_state, optimizers, plain_state, plan, shared_memory
from asyncckpt.restore.saved_parameters import SavedParameters, row_major
from asyncckpt.state import fqn
from faults import state_checks as checks
from faults.mutants.registry import Patch, around, mutant


@mutant("an optimizer's state is cast to its parameter's dtype", checks.an_optimizer_has_the_dtypes_that_it_had)
def _(patch: Patch) -> None:
    def cast(self: Any, record: Any, parameter: Any, saved: Any) -> Any:
        return parameter.dtype

    patch.setattr(optimizer_state.StateTargets, "_dtype", cast)
    patch.setattr(plain_state.PlainStates, "plan", lambda *_: None)


@mutant("plain state of an optimizer is made in another dtype", checks.an_optimizer_has_the_dtypes_that_it_had)
def _(patch: Patch) -> None:
    def made(record: Any, dtype: Any, device: Any) -> Any:
        return plan.new_tensor(record, torch.bfloat16 if dtype is torch.float32 else torch.float32, device)

    patch.setattr(plain_state, "new_tensor", made)


@mutant("what a class casts on loading stays cast", checks.so_has_one_that_loads_by_itself)
def _(patch: Patch) -> None:
    patch.setattr(optimizer_load, "put_back", lambda given, live: None)


@mutant("a module's memory format is not restored", checks.tensors_lie_in_memory_as_they_did)
def _(patch: Patch) -> None:
    patch.setattr(modules, "format_to_be", lambda live, saved: live.stride())


@mutant("the strides of an optimizer's state are lost", checks.tensors_lie_in_memory_as_they_did)
def _(patch: Patch) -> None:
    def strides(component: ComponentRecord, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return row_major(shape)

    patch.setattr(optimizer_state, "saved_strides", strides)


@mutant("state is taken whatever the shape of its parameter was", checks.state_of_another_shape_is_told)
def _(patch: Patch) -> None:
    patch.setattr(optimizers._OptimizerPlanner, "_misfit", lambda self, saved, parameter: None)


@mutant("what does not fit is forgotten", checks.state_of_another_shape_is_told, checks.another_class_is_told)
def _(patch: Patch) -> None:
    def merge(original: Any, self: plan.RestorePlan, other: plan.RestorePlan) -> None:
        other.mismatched.clear()
        original(self, other)

    around(patch, plan.RestorePlan, "merge", merge)


@mutant("an optimizer's class is not compared", checks.another_class_is_told)
def _(patch: Patch) -> None:
    patch.setattr(optimizers, "class_name", lambda optimizer: "")


@mutant("groups of parameters go by their number", checks.each_parameter_has_the_learning_rate_it_had)
def _(patch: Patch) -> None:
    patch.setattr(optimizers, "sources_of", lambda name, live_groups, trees: ([*range(len(live_groups))], []))


@mutant("a renamed parameter loses its state", checks.a_renamed_parameter_keeps_its_state)
def _(patch: Patch) -> None:
    def find(original: Any, self: SavedParameters, label: str) -> Any:
        self._rename = lambda name: name
        return original(self, label)

    around(patch, SavedParameters, "find", find)


@mutant("a wrapper's prefix stays in the names", checks.wrapped_layers_go_by_their_own_names)
def _(patch: Patch) -> None:
    patch.setattr(fqn, "_MAYBE_WRAPPED", re.compile(r"^_orig_mod\."))


@mutant("elements that share memory are filled by whoever comes last", checks.elements_that_share_memory_get_one_value)
def _(patch: Patch) -> None:
    patch.setattr(shared_memory, "may_overlap", lambda tensor: False)


@mutant("a module's own loading is not asked", checks.a_buffer_that_its_module_resizes_comes_back)
def _(patch: Patch) -> None:
    patch.setattr(modules, "_loads_itself", lambda part: False)
