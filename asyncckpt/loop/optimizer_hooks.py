"""Hooks on optimizers make the update of a training step wait for a save's copies."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from asyncckpt import interrupts
from asyncckpt.commit.in_flight import InFlightSaves
from asyncckpt.errors import ChangedWhileCopied, InvalidOption
from asyncckpt.loop.unused_gradients import UnusedGradients
from asyncckpt.memory import cuda
from asyncckpt.stage.checks import SnapshotChecks
from asyncckpt.stage.eager import OwnedMemory, OwnedRanges, storages
from asyncckpt.state.known_state import KnownState, Picker, Recaptured, picker
from asyncckpt.state.wrappers import plain_parts

log = logging.getLogger("asyncckpt")


class WatchedOptimizers:
    """Knows the optimizers whose parameters and state are copied while training goes on. For the training thread.

    ``saves`` are those whose copies must be made before anything watched changes; ``stall_timeout_seconds`` is the
    longest that training waits for one of them.

    A pre-hook of every optimizer step waits for what is not copied yet, right before the update changes it. It is
    torch's global one, because another optimizer, or one made anew, may step over the same parameters. ``GradScaler``
    skips the hook on steps that it skips: nothing changes then either.
    """

    def __init__(self, saves: InFlightSaves, stall_timeout_seconds: float) -> None:
        self._saves = saves
        self._stall_timeout_seconds = stall_timeout_seconds
        self._pid = os.getpid()
        #: The key is the identity, as not every optimizer can be hashed.
        self._optimizers: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        self._handles: list[RemovableHandle] = []
        #: These optimizers were seen to step inside CUDA graphs, whose replays call no hook.
        self._captured: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        #: Of these was said that they may do so.
        self._told: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        #: Of the latest save, and of those before that a device has not answered for yet.
        self._checks: list[SnapshotChecks] = []
        self._gradients = UnusedGradients()
        #: The memory that was owned at the latest save.
        self._ranges: OwnedRanges | None = None
        self._remembered: _Remembered | None = None

    def add(self, *optimizers: torch.optim.Optimizer) -> None:
        """Watch these optimizers, or the ones that they wrap. Idempotent. Raises ``InvalidOption`` for anything else,
        and for a wrapper that does not show which optimizer steps; then none of them is watched."""
        while _retired:  # not when they were retired, which may be while torch goes through its hooks
            _retired.pop().remove()
        for stepping in [optimizer_that_steps(optimizer) for optimizer in optimizers]:
            if stepping in self:
                continue
            # neither torch's table of hooks nor an optimizer may keep this object alive
            if not self._handles:
                for handle in (
                    register_optimizer_step_pre_hook(_hook(weakref.WeakMethod(self._before_step))),
                    register_optimizer_step_post_hook(_hook(weakref.WeakMethod(self._after_step))),
                ):
                    self._handles.append(handle)
                    weakref.finalize(self, _retired.append, handle)
            # load_state_dict replaces the state by copies, but changes its groups' tensors (a tensor lr) in place
            loading = _hook(weakref.WeakMethod(self._before_load))
            self._handles.append(stepping.register_load_state_dict_pre_hook(loading))
            self._optimizers[id(stepping)] = weakref.ref(stepping)

    def check(self, checks: SnapshotChecks) -> None:
        """Tell these checks of a new save when the update begins."""
        self._checks.append(checks)

    def training_waits(self) -> None:
        """Tell the saves in flight that no operation of training is running now. Never blocks."""
        for flight in self._saves.all():
            flight.job.training_waits()

    def before_change(self, where: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copy now whatever is not copied yet, as watched optimizers' memory is about to change: by the step of
        ``optimizer``, where there is one, all that it may change. Blocks until it is copied. ``where`` names the change
        in the stall's event. While a CUDA graph is captured, nothing is enqueued: what is not copied then fails its
        save."""
        if os.getpid() != self._pid:  # a forked child's parameters belong to it alone
            return
        if cuda.is_capturing():
            self._capture(optimizer)
            return
        with cuda.beside_captures():
            self._copy_before(where, optimizer)

    def _copy_before(self, where: str, optimizer: torch.optim.Optimizer | None) -> None:
        changed = _Changed(optimizer, self._owns_everything(optimizer))
        for flight in self._saves.all():
            job = flight.job
            job.training_waits()
            if job.is_apart or (job.done and not job.on_device):
                continue
            pieces = changed.pieces(job.checks)
            if pieces is not None and not pieces:
                continue
            began = time.perf_counter()
            job.finish(time.monotonic() + self._stall_timeout_seconds, pieces)
            job.note_stall(began, where)
        for checks in self._checks:
            checks.update_begins(changed.pieces(checks), known=changed.is_located)

    def _owns_everything(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Whether nothing is deferred but what this change may change."""
        return optimizer is None or (optimizer in self and len(self._alive()) == 1)

    def _capture(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            self._captured[id(optimizer)] = weakref.ref(optimizer)
        for flight in self._saves.all():
            checks = flight.job.checks
            if checks is not None and checks.unsettled:
                step = flight.save.step
                flight.save.scope.fail(
                    ChangedWhileCopied(
                        f"step {step}: an optimizer's step was captured in a CUDA graph before the state was copied. "
                        f"Nothing was published. Wait for the save before the capture (PendingSave.staged())"
                    )
                )

    def __contains__(self, optimizer: torch.optim.Optimizer) -> bool:
        reference = self._optimizers.get(id(optimizer))
        return reference is not None and reference() is optimizer

    def _alive(self) -> list[torch.optim.Optimizer]:
        return _alive(self._optimizers)

    def owned(self, known: KnownState | None = None, again: Recaptured | None = None) -> OwnedMemory:
        """Return the memory that only an optimizer's step changes: trained parameters and their state. A parameter with
        ``requires_grad=False`` is left out: whoever froze it may change it elsewhere, as a momentum encoder does in its
        forward. What an optimizer steps over inside a CUDA graph is left out, too, and what one was told that it may
        (``capturable=True``), as nobody sees a capture that came before ``watch``: no hook is called then. At the
        beginning of a save, before it is decided what is deferred: what devices have found out since then counts.
        ``known``, ``again``: what is known of the state that is saved, see ``Captured``; what is watched and known is
        not looked at again."""
        self._checks = [checks for checks in self._checks if checks.waits_for_device()]
        watched = tuple(self._optimizers.values())
        replayed = self._replayed()
        remembered, ranges = self._remembered, self._ranges
        if known is not None and again is not None and remembered is not None and ranges is not None:
            vouched = {id(optimizer) for optimizer in again.optimizers}
            if (
                remembered.known is known
                and remembered.watched == watched
                and not replayed
                and all((optimizer := one()) is not None and id(optimizer) in vouched for one in watched)
            ):
                return OwnedMemory.known(ranges, remembered.pick(again.tensors))
        memory = OwnedMemory(ranges)
        owned: list[torch.Tensor] = []
        for optimizer in self._alive():
            owned += plain_parts(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
            owned += _state_tensors(optimizer)
        excluded = {id(tensor) for one in replayed for tensor in _tensors(one)}
        memory.add(owned if not excluded else [tensor for tensor in owned if id(tensor) not in excluded])
        self._ranges = memory.ranges
        self._remembered = None
        numbers = known.numbers if known is not None and not replayed else {}
        if known is not None and all(id(holder) in numbers for holder in memory.holders):
            self._remembered = _Remembered(known, watched, picker([numbers[id(holder)] for holder in memory.holders]))
        return memory

    def _replayed(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers whose steps a CUDA graph may make, as far as can be told."""
        may_be = [one for one in self._alive() if any(group.get("capturable") for group in one.param_groups)]
        for optimizer in may_be:
            told = self._told.get(id(optimizer))
            if told is None or told() is not optimizer:
                self._told[id(optimizer)] = weakref.ref(optimizer)
                log.warning(
                    "%s has capturable=True: a CUDA graph may replay its step, and no hook is called then. What it "
                    "owns is copied before save() returns; where its step is never captured, make it without that",
                    type(optimizer).__name__,
                )
        seen = {id(optimizer) for optimizer in may_be}
        return may_be + [one for one in _alive(self._captured) if id(one) not in seen]

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        busy = self._saves.all() or any(checks.awaits_update for checks in self._checks)
        with interrupts.deferred() if busy else contextlib.nullcontext():
            self.before_change("optimizer.step", optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._gradients.used(optimizer)

    def tell_of_unused_gradients(self, step: int) -> None:
        """Log, once, where a save comes between backward and the step of a watched optimizer. Never blocks."""
        self._gradients.tell(step, (one for one in self._alive() if id(one) not in self._captured))

    def _before_load(self, _optimizer: torch.optim.Optimizer) -> None:
        with interrupts.deferred():
            self.before_change("guard")

    def __bool__(self) -> bool:
        return bool(self._alive())

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()
        self._captured.clear()
        self._checks.clear()
        self._remembered = None


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What is owned of a known state: ``pick`` takes it out of the state's tensors. ``watched``: by which optimizers,
    as long as they have what they had."""

    known: KnownState
    watched: tuple[weakref.ref[torch.optim.Optimizer], ...]
    pick: Picker


class _Changed:
    """What a change may change: the memory that an optimizer's parameters and state lie in.

    ``optimizer``: the one that is about to step, None for a change of anything. ``everything``: nothing but what it has
    is watched.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, everything: bool) -> None:
        self._blocks: set[int] | None = None
        #: Whether it is known where the change happens.
        self.is_located = True
        if optimizer is not None and not everything:
            try:
                self._blocks = storages(_tensors(optimizer))
            except (NotImplementedError, RuntimeError):  # sparse tensors, and wrappers that compute their values
                self.is_located = False

    def pieces(self, checks: SnapshotChecks | None) -> set[int] | None:
        """Return the indexes of the pieces that may change; None for all."""
        if self._blocks is None or checks is None:
            return None
        return checks.pieces_in(self._blocks)


#: These hooks belong to watchers that are gone, and do nothing any more.
_retired: list[RemovableHandle] = []


def _hook(before: weakref.WeakMethod[Callable[[torch.optim.Optimizer], None]]) -> Callable[..., None]:
    """Make a hook of an optimizer that calls a method, and does nothing once the method's object is gone."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = before()
        if alive is not None:
            alive(optimizer)

    return hook


def _alive(references: Mapping[int, weakref.ref[torch.optim.Optimizer]]) -> list[torch.optim.Optimizer]:
    found = [reference() for reference in references.values()]
    return [optimizer for optimizer in found if optimizer is not None]


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the plain tensors of an optimizer: of one that wraps others, those inside."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return plain_parts(parameters) + _state_tensors(optimizer)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = (values.values() for values in optimizer.state.values() if isinstance(values, dict))
    return plain_parts(value for values in found for value in values if isinstance(value, torch.Tensor))


def optimizer_that_steps(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer whose ``step`` torch's hooks see: this one, or the one inside a wrapper that was never
    initialised as an optimizer (Accelerate's). Raises ``InvalidOption`` where there is none, or more than one."""
    found, passed = optimizer, [optimizer]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidOption(f"watch takes a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    while not _is_hooked(found):
        inside = {id(v): v for v in vars(found).values() if isinstance(v, torch.optim.Optimizer) and v not in passed}
        if len(inside) != 1:
            raise InvalidOption(_unfollowed(optimizer, "which optimizer inside it steps"))
        (found,) = inside.values()
        passed.append(found)
    if _parameter_ids(found) != _parameter_ids(optimizer):
        raise InvalidOption(_unfollowed(optimizer, f"what else steps than the {type(found).__name__} inside it"))
    return found


def _is_hooked(optimizer: torch.optim.Optimizer) -> bool:
    # Optimizer.__init__ makes the instance's hooks, and has the class's step call them
    return "_optimizer_step_pre_hooks" in vars(optimizer) and getattr(type(optimizer).step, "hooked", False)


def _parameter_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _unfollowed(optimizer: torch.optim.Optimizer, what: str) -> str:
    return (
        f"watch: {type(optimizer).__name__} wraps another optimizer without being one (Optimizer.__init__ never ran), "
        f"and it cannot be told {what}. Pass the optimizer that steps, or do not watch: saves are then copied at once"
    )
