"""Lightning hands over no optimizers, only their states. This finds the optimizers, so that saves overlap training."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class SteppingOptimizers:
    """Takes note of each optimizer of the process that steps, while it listens. Holds none of them. For the training
    thread."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._handle: Any = None

    def listen(self) -> None:
        """Begin to take note. Idempotent."""
        if self._handle is None:
            seen = self._seen
            self._handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.add(optimizer))

    def stop(self) -> None:
        """Take note no more, and forget all. Idempotent."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._seen.clear()

    def owners_of(self, states: Any) -> list[torch.optim.Optimizer]:
        """Return the optimizers whose own tensors are in ``states``, what their ``state_dict`` returned."""
        given = {id(tensor) for tensor in _tensors(states)}
        return [one for one in self._seen if any(id(tensor) in given for tensor in _tensors(list(one.state.values())))]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
