"""Planted bugs: what is saved is copied too late, or into memory that others use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncckpt import starter
from asyncckpt.loop import optimizer_hooks as hooks
from asyncckpt.memory.arena import Arena
from asyncckpt.stage import eager as owned_memory
from asyncckpt.stage import job as staging
from asyncckpt.stage.checks import SnapshotChecks
from asyncckpt.stage.deferral import Deferral
from asyncckpt.stage.eager import OwnedMemory
from asyncckpt.stage.samples import Sampler
from asyncckpt.stage.trial import Trial
from faults import while_copying
from faults.mutants.registry import Patch, around, mutant


@mutant(
    "memory is given back without the copies still queued into it",
    while_copying.copies_of_a_failed_save_land_on_nothing,
    while_copying.nor_on_what_the_host_writes,
)
def _(patch: Patch) -> None:
    around(patch, Arena, "release", lambda original, self, slot: original(self, replace(slot, copies=())))


@mutant("the host writes into memory that copies are queued into", while_copying.nor_on_what_the_host_writes)
def _(patch: Patch) -> None:
    patch.setattr(staging, "host_writes", lambda *_: False)


@mutant(
    "an error of the thread that copies is not told to the save",
    while_copying.a_save_that_cannot_be_copied_ends_at_once,
)
def _(patch: Patch) -> None:
    patch.setattr(staging.StagingJob, "cancel", lambda *_: None)


@mutant("only the watched optimizer waits for what is deferred", while_copying.an_optimizer_made_anew_waits)
def _(patch: Patch) -> None:
    def before(original: Any, self: hooks.WatchedOptimizers, optimizer: Any) -> None:
        if optimizer in self:
            original(self, optimizer)

    around(patch, hooks.WatchedOptimizers, "_before_step", before)


@mutant("what an optimizer has is deferred, frozen or not", while_copying.frozen_parameters_are_not_deferred)
def _(patch: Patch) -> None:
    def owned(self: hooks.WatchedOptimizers, *_known: Any) -> Any:
        memory = OwnedMemory()
        for optimizer in self._alive():
            memory.add(p for group in optimizer.param_groups for p in group["params"])
        return memory

    def divided(pieces: Any, owned: OwnedMemory, earned: Any, divider: Any, *_known: Any) -> Any:
        thawed = [replace(one, spec=replace(one.spec, frozen=False)) for one in pieces]
        return owned_memory.divide(thawed, owned, earned, divider)

    patch.setattr(hooks.WatchedOptimizers, "owned", owned)
    patch.setattr(starter, "divide", divided)


@mutant("a whole memory block counts as owned", while_copying.buffers_beside_parameters_are_not_deferred)
def _(patch: Patch) -> None:
    patch.setattr(owned_memory, "_span", owned_memory._block)
    patch.setattr(OwnedMemory, "_is_apart", lambda *_: False)

    def add(self: OwnedMemory, tensors: Any) -> None:
        self.ranges.others += [owned_memory._block(tensor) for tensor in tensors]

    patch.setattr(OwnedMemory, "add", add)


@mutant(
    "what no step has shown to stay is deferred",
    while_copying.nothing_is_deferred_before_it_was_shown_to_stay,
)
def _(patch: Patch) -> None:
    patch.setattr(Deferral, "earned", lambda self, keys: frozenset(range(len(keys))))


@mutant("what has lost its deferral is deferred again", while_copying.one_changed_item_of_what_is_deferred_is_told)
def _(patch: Patch) -> None:
    patch.setattr(Deferral, "lose", lambda *_: None)


@mutant("torch's counters are not looked at", while_copying.one_changed_item_of_what_is_deferred_is_told)
def _(patch: Patch) -> None:
    patch.setattr(SnapshotChecks, "_moved", lambda *_: set())


@mutant("no samples are taken of what is deferred", while_copying.a_change_that_torch_does_not_count_is_told)
def _(patch: Patch) -> None:
    patch.setattr(Sampler, "take", lambda *_: [])


@mutant("a trial looks at nothing", while_copying.nothing_is_deferred_before_it_was_shown_to_stay)
def _(patch: Patch) -> None:
    def earned_at_once(_: Any, self: Trial, looked_at: Any) -> None:
        self._deferral.earn(self._keys[index] for index in looked_at)

    around(patch, Trial, "_look", earned_at_once)
