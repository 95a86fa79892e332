"""Planted bugs: what is saved is copied too late, or into memory that others use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncckpt import starter
from asyncckpt.loop import optimizer_hooks as hooks
from asyncckpt.memory.arena import Arena
from asyncckpt.stage import eager as owned_memory
from asyncckpt.stage import job as staging
from asyncckpt.stage.eager import OwnedMemory
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
    patch.setattr(hooks.WatchedOptimizers, "_concerns", lambda self, optimizer, flight: optimizer in self)


@mutant("what an optimizer has is deferred, frozen or not", while_copying.frozen_parameters_are_not_deferred)
def _(patch: Patch) -> None:
    def owned(self: hooks.WatchedOptimizers) -> Any:
        memory = OwnedMemory()
        for optimizer in self._alive():
            memory.add(p for group in optimizer.param_groups for p in group["params"])
        return memory

    def divided(pieces: Any, owned: OwnedMemory) -> Any:
        return owned_memory.divide([replace(one, spec=replace(one.spec, frozen=False)) for one in pieces], owned)

    patch.setattr(hooks.WatchedOptimizers, "owned", owned)
    patch.setattr(starter, "divide", divided)


@mutant("a whole memory block counts as owned", while_copying.buffers_beside_parameters_are_not_deferred)
def _(patch: Patch) -> None:
    patch.setattr(owned_memory, "_span", owned_memory._block)
    patch.setattr(OwnedMemory, "_is_apart", lambda *_: False)

    def add(self: OwnedMemory, tensors: Any) -> None:
        self._others += [owned_memory._block(tensor) for tensor in tensors]

    patch.setattr(OwnedMemory, "add", add)
