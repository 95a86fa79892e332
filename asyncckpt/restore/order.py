"""The order in which components are restored: what may still be refused comes where least is lost.

An object with a ``load_state_dict`` of its own may refuse its values, and nobody knows before. One that reaches no
other component of the state is asked first, before any tensor is filled, and then torch's schedulers, which take
anything. One that does reach others may look at them, and comes after them. Random number generators come last:
whatever runs before may draw from them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import nn

from asyncckpt.state.capture import kind_of
from asyncckpt.state.rng import RngState

FIRST, SCHEDULERS, TENSORS, OBJECTS, GENERATORS = range(5)
#: Objects of these classes take their state without looking at what they steer.
_ALONE: Final = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_TAKE_ANYTHING: Final = torch.optim.lr_scheduler.LRScheduler
_LEAVES: Final = (str, bytes, int, float, complex, type(None), type, torch.Tensor, BuiltinFunctionType, ModuleType)
#: An object that is larger than this is taken to reach everything.
_MOST_LOOKED_AT: Final = 20_000


def turn_of(name: str, state: Mapping[str, Any]) -> int:
    """Return when a component's turn comes: ``FIRST``, ``SCHEDULERS``, ``TENSORS``, ``OBJECTS`` or ``GENERATORS``."""
    value = state[name]
    if isinstance(_marked(value), RngState):
        return GENERATORS
    if kind_of(value) != "stateful":
        return TENSORS if kind_of(value) != "plain" else OBJECTS
    others = {id(_marked(other)) for key, other in state.items() if key != name and not isinstance(other, _LEAVES)}
    if _reaches(_marked(value), others):
        return OBJECTS
    return SCHEDULERS if isinstance(_marked(value), _TAKE_ANYTHING) else FIRST


def _marked(value: Any) -> Any:
    """Return what is inside markers such as ``Replicated``."""
    while type(value).__module__ == "asyncckpt.state.markers" and hasattr(value, "value"):
        value = value.value
    return value


def _reaches(value: Any, others: set[int]) -> bool:
    """Return whether an object leads to another component, a module or an optimizer by the references that it holds:
    attributes, what is in them, and what methods are bound to. What its code names is not looked at."""
    if isinstance(value, _ALONE) and type(value).__module__.startswith("torch."):
        return False
    seen: set[int] = set()
    left = [value]
    while left:
        here = left.pop()
        if id(here) in seen or isinstance(here, _LEAVES):
            continue
        seen.add(id(here))
        if len(seen) > _MOST_LOOKED_AT:
            return True
        if here is not value and (id(here) in others or isinstance(here, nn.Module | torch.optim.Optimizer)):
            return True
        if isinstance(here, FunctionType):  # its globals are everything
            left += [*(here.__closure__ or ()), *(here.__defaults__ or ())]
        elif isinstance(here, weakref.ref):
            left.append(here())
        else:
            left += gc.get_referents(here)
    return False
