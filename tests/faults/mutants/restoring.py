"""Planted bugs: half a restore, and nobody is told."""

from __future__ import annotations

from typing import Any

from asyncckpt.restore import carrying_out, changes, live_memory, modules, order, trees
from faults import restore_checks as checks
from faults.mutants.registry import Patch, around, mutant


@mutant("what is filled is not noted", checks.what_changed_is_said)
def _(patch: Patch) -> None:
    def filled(original: Any, self: Any, *args: Any) -> Any:
        begin, self.changes.begin = self.changes.begin, lambda _name: None
        try:
            return original(self, *args)
        finally:
            self.changes.begin = begin

    around(patch, carrying_out.Planned, "_fill", filled)


@mutant("all components count as overwritten", checks.what_changed_is_said)
def _(patch: Patch) -> None:
    patch.setattr(changes.Changes, "overwritten", property(lambda self: self._names))


@mutant("the message does not say what was overwritten", checks.what_changed_is_said)
def _(patch: Patch) -> None:
    patch.setattr(changes.Changes, "sentence", lambda self: "The restore was broken off.")


@mutant("objects that may refuse are asked after the tensors", checks.what_may_refuse_comes_first)
def _(patch: Patch) -> None:
    patch.setattr(order, "_reaches", lambda value, others: True)


@mutant("an error of a component's own passes as it is", checks.what_may_refuse_comes_first)
def _(patch: Patch) -> None:
    patch.setattr(trees, "load", lambda name, call: call())


@mutant("half of a damaged checkpoint stays below an older one", checks.an_older_one_leaves_no_half)
def _(patch: Patch) -> None:
    patch.setattr(changes.Changes, "leave", lambda self, where, left: None)


@mutant("tied weights are filled by two threads", checks.tied_weights_get_one_value)
def _(patch: Patch) -> None:
    patch.setattr(carrying_out, "separate", lambda plans: None)


@mutant("tied weights on the meta device get the first values", checks.tied_weights_get_one_value)
def _(patch: Patch) -> None:
    patch.setattr(modules, "_check_tied", lambda group: None)


@mutant("a tensor without memory is filled all the same", checks.memory_that_takes_nothing_is_told)
def _(patch: Patch) -> None:
    def problem(original: Any, self: Any, tensor: Any) -> Any:
        return None if tensor.is_meta else original(self, tensor)

    around(patch, live_memory.Memory, "problem", problem)


@mutant("a buffer stays on the meta device", checks.nothing_stays_on_the_meta_device_unsaid)
def _(patch: Patch) -> None:
    patch.setattr(modules, "_left_on_meta", lambda name, module, live, opts: [])


@mutant("generators are set in their turn", checks.generators_are_set_last)
def _(patch: Patch) -> None:
    patch.setattr(order, "GENERATORS", order.FIRST)
