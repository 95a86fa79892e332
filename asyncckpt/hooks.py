"""Training-step hooks: what asks asyncckpt to act, from inside a training loop and from outside it."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from asyncckpt import forks
from asyncckpt.errors import InvalidOption
from asyncckpt.stage.eager import OwnedMemory, storages


class Watched:
    """The optimizers whose parameters and state are copied while training goes on.

    A pre-hook of every optimizer step waits for what is not copied yet, right before the update changes it: torch's
    global one, because another optimizer, or one made anew, may step over the same parameters. ``GradScaler`` skips the
    hook on steps that it skips: nothing changes then either.
    """

    def __init__(self, before_change: Callable[[str, torch.optim.Optimizer | None], None]) -> None:
        self._before_change = before_change
        #: By identity: not every optimizer can be hashed.
        self._optimizers: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        self._handles: list[RemovableHandle] = []

    def add(self, *optimizers: torch.optim.Optimizer) -> None:
        """Watch these optimizers, or the ones that they wrap. Idempotent. Raises ``InvalidOption`` for anything else,
        and for a wrapper of which nobody can tell which optimizer steps; nothing is remembered then."""
        while _retired:  # not when they were let go of, which may be while torch goes through its hooks
            _retired.pop().remove()
        for stepping in [optimizer_that_steps(optimizer) for optimizer in optimizers]:
            if stepping in self:
                continue
            if not self._handles:
                handle = register_optimizer_step_pre_hook(_calling(weakref.WeakMethod(self._before_step)))
                self._handles.append(handle)
                weakref.finalize(self, _retired.append, handle)
            # optimizer.load_state_dict replaces the state by copies, but its groups' tensors (a tensor lr) in place
            before = self._before_change  # not this object, which the optimizer would keep alive
            self._handles.append(
                stepping.register_load_state_dict_pre_hook(lambda *_, call=before: call("guard", None))
            )
            self._optimizers[id(stepping)] = weakref.ref(stepping)

    def __contains__(self, optimizer: torch.optim.Optimizer) -> bool:
        reference = self._optimizers.get(id(optimizer))
        return reference is not None and reference() is optimizer

    def _alive(self) -> list[torch.optim.Optimizer]:
        found = [reference() for reference in self._optimizers.values()]
        return [optimizer for optimizer in found if optimizer is not None]

    def owned(self) -> OwnedMemory:
        """The memory that only an optimizer's step changes: trained parameters and their state. One with
        ``requires_grad=False`` is not: whoever froze it may change it elsewhere, a momentum encoder in its forward."""
        memory = OwnedMemory()
        for optimizer in self._alive():
            memory.add([p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])
            memory.add(_state_tensors(optimizer))
        return memory

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._before_change("optimizer.step", optimizer)

    def __bool__(self) -> bool:
        return bool(self._alive())

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()


#: Hooks of watchers that are gone: they do nothing any more.
_retired: list[RemovableHandle] = []


def _calling(before: weakref.WeakMethod[Callable[[torch.optim.Optimizer], None]]) -> Callable[..., None]:
    """A step hook that does nothing once its object is gone."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        method = before()
        if method is not None:
            method(optimizer)

    return hook


def may_change(optimizer: torch.optim.Optimizer, tensors: Collection[torch.Tensor]) -> bool:
    """Whether a step of the optimizer may change one of the tensors: it has something in the same memory block, or
    something of which nobody can tell where it lies."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        return not storages(tensors).isdisjoint(storages([*parameters, *_state_tensors(optimizer)]))
    except (NotImplementedError, RuntimeError):  # sparse tensors, and wrappers that compute their values
        return True


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = (values.values() for values in optimizer.state.values() if isinstance(values, dict))
    return [value for values in found for value in values if isinstance(value, torch.Tensor)]


def optimizer_that_steps(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` torch's hooks see: this one or, of a wrapper that was never initialised as one
    (Accelerate's), the one inside it. Raises ``InvalidOption`` where there is none, or more than one."""
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
    # what Optimizer.__init__ does: make the instance's hooks, and have the class's step call them
    return "_optimizer_step_pre_hooks" in vars(optimizer) and getattr(type(optimizer).step, "hooked", False)


def _parameter_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _unfollowed(optimizer: torch.optim.Optimizer, what: str) -> str:
    return (
        f"watch: {type(optimizer).__name__} wraps another optimizer without being one (Optimizer.__init__ never ran), "
        f"and it cannot be told {what}. Pass the optimizer that steps, or do not watch: saves are then copied at once"
    )


@dataclass(frozen=True, slots=True)
class Preemption:
    """Save on a signal, then leave: ``Checkpointer(..., preempt=Preemption())``.

    On one of ``signals`` the next ``step`` saves, waits until the checkpoint is durable, for at most
    ``deadline_seconds`` after the signal, and raises ``Preempted`` (a ``SystemExit``), so ``with`` blocks and
    ``finally`` run. The exit code is 128 + the signal's number unless ``exit_code`` is given: a scheduler sees that
    the job did not finish.
    """

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)
    deadline_seconds: float = 30.0
    exit_code: int | None = None

    def __post_init__(self) -> None:
        if not self.deadline_seconds > 0:
            raise InvalidOption(f"Preemption.deadline_seconds must be > 0, not {self.deadline_seconds!r}")


class Preempted(SystemExit):
    """Raised by ``step`` once the preemption save is durable. ``step`` is the saved step."""

    def __init__(self, code: int, step: int) -> None:
        super().__init__(code)
        self.step = step


class SignalWatch:
    """Remembers that a signal came; never saves inside the handler, where nothing is safe. A forked child has the
    handlers that were there before."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption
        self.received: signal.Signals | None = None
        self._deadline = 0.0
        if threading.current_thread() is not threading.main_thread():
            raise InvalidOption("preempt: signals can only be watched from a Checkpointer made on the main thread")
        self._pid = os.getpid()
        self._previous = {number: signal.signal(number, self._handle) for number in preemption.signals}
        forks.disarm_in_child(self)

    def notice(self) -> None:
        """Another rank of the job was signalled: as if this one had been, now."""
        if self.received is None:
            self._handle(int(self.preemption.signals[0]), None)

    def remaining_seconds(self) -> float:
        """Until the deadline; 0.0 where it has passed."""
        return max(0.0, self._deadline - time.monotonic())

    def exit_code(self) -> int:
        """What ``Preempted`` carries."""
        if self.preemption.exit_code is not None:
            return self.preemption.exit_code
        return 128 + int(self.received or 0)

    def close(self) -> None:
        """Put the previous handlers back, where ours are still in place."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle and threading.current_thread() is threading.main_thread():
                signal.signal(number, previous)

    def disarm(self) -> None:
        for number in self._previous:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, self._before(number))

    def _before(self, number: int) -> Any:
        """The handler that was there before any of this library's."""
        found: Any = self._previous.get(signal.Signals(number))
        while isinstance(watch := getattr(found, "__self__", None), SignalWatch):
            found = watch._previous.get(signal.Signals(number))
        return signal.SIG_DFL if found is None else found

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child's own handler has called this one
            before = self._before(number)
            if callable(before):
                before(number, frame)
            elif before == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received is None:
            self._deadline = time.monotonic() + self.preemption.deadline_seconds
            self.received = signal.Signals(number)
