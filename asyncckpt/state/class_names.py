"""The class of a module or an optimizer is recorded by its name, without what wraps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asyncckpt.state.fqn import unwrapped
from asyncckpt.state.optimizer import wrapped_optimizer

#: Longer names of classes are left out; readers take them for an attack.
_LONGEST_NAME = 1000


def class_name(value: Any) -> str:
    """Return the qualified name of an object's class, without the wrappers whose prefixes FQNs leave out and without
    optimizers that only hand on to another one. It is empty where it would be absurdly long."""
    if isinstance(value, nn.Module):
        value = unwrapped(value)
    elif isinstance(value, torch.optim.Optimizer):
        value = wrapped_optimizer(value)
    found = f"{type(value).__module__}.{type(value).__qualname__}"
    return found if len(found) <= _LONGEST_NAME else ""
