"""An optimizer takes over its restored state: exactly, whatever its class does on loading."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt.protocols import Stateful
from asyncckpt.restore.plan import load
from asyncckpt.state.dtensor import is_distributed
from asyncckpt.state.optimizer import wrapped_optimizer


@dataclass(slots=True)
class RestoredState:
    """``RestoredState`` is what an optimizer is given. ``states``: by the parameter's index. ``others``: state that is
    no parameter's. ``groups``: hyperparameters of each live group. ``extra``: what else the class's ``state_dict`` has.
    ``kept``: the indexes of the parameters whose live state stays as it is. ``in_place``: those whose state is the very
    live tensors, which are filled."""

    states: dict[int, Any] = field(default_factory=dict)
    others: dict[Any, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    in_place: set[int] = field(default_factory=set)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List the parameters in the order of torch's indexes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def loads_as_torch_does(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether nothing but torch's own code runs when the optimizer loads a state."""
    torchs = torch.optim.Optimizer.load_state_dict
    hooks = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    return (
        type(optimizer).load_state_dict is torchs
        and "load_state_dict" not in vars(optimizer)
        and not any(getattr(optimizer, name, None) for name in hooks)
    )


def install(optimizer: torch.optim.Optimizer, new: RestoredState) -> None:
    """Give an optimizer its state without ``load_state_dict``, which would cast every tensor to its parameter's dtype.
    Live dicts keep their identity. ``__setstate__`` runs, as it does on loading: it adds what older versions of the
    class did not have."""
    state = optimizer.state
    live = {id(parameter): parameter for parameter in parameters_of(optimizer)}
    for key in list(state):
        if id(key) not in live and key not in new.others:
            del state[key]
    state.update(new.others)
    for index, parameter in enumerate(live.values()):
        if index in new.kept or index in new.in_place:
            continue
        value, found = new.states.get(index), state.get(parameter)
        if index not in new.states:
            state.pop(parameter, None)
        elif type(value) is dict and type(found) is dict:
            found.clear()
            found.update(value)
        else:
            state[parameter] = value
    for group, values in zip(optimizer.param_groups, new.groups, strict=True):
        group.update(values)
    optimizer.__setstate__({"state": state, "param_groups": optimizer.param_groups})


def load_exactly(name: str, optimizer: torch.optim.Optimizer, new: RestoredState) -> None:
    """Give an optimizer its state through its own ``load_state_dict``, and then put back those tensors that this has
    only cast or laid out anew. Raises ``StateMismatch`` where the optimizer does not take the state."""
    parameters = parameters_of(optimizer)
    kept = {i: optimizer.state[parameters[i]] for i in new.kept if parameters[i] in optimizer.state}
    numbered = iter(range(len(parameters)))
    groups = [
        {**group, **values, "params": [next(numbered) for _ in group["params"]]}
        for group, values in zip(optimizer.param_groups, new.groups, strict=True)
    ]
    given = {**new.extra, "state": {**new.others, **new.states, **kept}, "param_groups": groups}
    load(name, lambda: optimizer.load_state_dict(_new_containers(given)))
    for index, values in new.states.items():
        if parameters[index] in optimizer.state:
            put_back(values, optimizer.state[parameters[index]])
    put_back(given, optimizer.state_dict())


def load_whole(name: str, target: Any, given: Any) -> None:
    """Give an object its state through ``load_state_dict`` and put exact tensors back, as ``load_exactly`` does."""
    load(name, lambda: target.load_state_dict(_new_containers(given)))
    put_back(given, target.state_dict())


def _new_containers(value: Any) -> Any:
    """Copy dicts and lists, but not what they hold: whoever loads a state may change them."""
    if type(value) is dict:
        return {key: _new_containers(item) for key, item in value.items()}
    if type(value) is list:
        return [_new_containers(item) for item in value]
    return value


def put_back(given: Any, live: Any) -> None:
    """Replace the tensors in ``live`` that have the values of those in ``given``, but in another dtype or memory
    format, by the latter. A tensor that was changed otherwise was changed on purpose."""
    for key, value in _items(given):
        try:
            found = live[key]
        except (KeyError, IndexError, TypeError):
            continue
        if isinstance(value, torch.Tensor) and isinstance(found, torch.Tensor):
            if _was_only_cast(value, found) and isinstance(live, dict | list):
                live[key] = _on(value, found.device)
        elif value is not found:
            put_back(value, found)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _was_only_cast(given: torch.Tensor, found: torch.Tensor) -> bool:
    if given is found or given.shape != found.shape or is_distributed(given) or is_distributed(found):
        return False
    if type(given) is not torch.Tensor or (given.dtype == found.dtype and given.stride() == found.stride()):
        return False
    cast = given.to(device=found.device, dtype=found.dtype)
    return bool(((cast == found) | ((cast != cast) & (found != found))).all())


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device == device:
        return tensor
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.copy_(tensor)


class CannotMake(Exception):
    """An object of a stored state has no live counterpart, and cannot be made. The message says why."""


def make_object(
    optimizer: torch.optim.Optimizer,
    live: Any,
    class_name: str,
    state: Any,
    later: list[Callable[[], None]],
) -> Any:
    """Return the object that a stored state belongs to. ``live``: what stands in its place now. What must run
    once the state's tensors are filled is added to ``later``. Raises ``CannotMake``.

    A stored name never leads to an import. The class is that of the live object, or one that the optimizer's own code
    can name, and it must be one whose objects are stored.
    """
    kind = type(live) if live is not None and _bare(_name_of(type(live))) == _bare(class_name) else None
    kind = kind or _known_class(optimizer, class_name)
    if kind is None:
        raise CannotMake(f"an object of class {class_name!r:.200} was saved, which the live optimizer does not know")
    if issubclass(kind, enum.Enum):
        try:
            return kind(state)
        except ValueError as error:
            raise CannotMake(str(error)) from error
    if issubclass(kind, Stateful):
        target = live if type(live) is kind else _made(kind, class_name)
        later.append(lambda: load_whole(class_name, target, state))
        return target
    fields = {entry.name for entry in dataclasses.fields(kind)}
    if type(state) is not dict or state.keys() != fields:
        raise CannotMake(f"the fields of the class {class_name!r:.200} are others than were saved")
    target = object.__new__(kind)
    for key, value in state.items():
        object.__setattr__(target, key, value)
    return target


def _made(kind: type, class_name: str) -> Any:
    try:
        return kind()
    except Exception as error:
        raise CannotMake(
            f"an object of class {class_name!r:.200} was saved, and a new one cannot be made without arguments "
            f"({type(error).__name__}: {error}): let the optimizer make it, by a step, before restoring"
        ) from error


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _bare(class_name: str) -> str:
    return class_name.rpartition(".")[2]


def _known_class(optimizer: torch.optim.Optimizer, class_name: str) -> type | None:
    """Find a class of that name among those that the modules and methods of the optimizer's class can name."""
    fits = [kind for kind in _classes_near(type(optimizer)) if _bare(_name_of(kind)) == _bare(class_name)]
    exact = [kind for kind in fits if _name_of(kind) == class_name]
    return next(iter(exact or fits), None)


def tensor_class(optimizer: torch.optim.Optimizer, class_name: str) -> type | None:
    """Find a tensor subclass of that name among those that the modules and methods of the optimizer's class, or of the
    one that it wraps, can name."""
    kind = type(wrapped_optimizer(optimizer))
    fits = [
        one
        for one in _named_near(kind)
        if isinstance(one, type) and issubclass(one, torch.Tensor) and _bare(_name_of(one)) == _bare(class_name)
    ]
    return next((one for one in fits if _name_of(one) == class_name), next(iter(fits), None))


_STORED = (Stateful, enum.Enum)


def _classes_near(kind: type) -> Iterable[type]:
    for value in _named_near(kind):
        if isinstance(value, type) and (dataclasses.is_dataclass(value) or issubclass(value, _STORED)):
            yield value


def _named_near(kind: type) -> Iterable[Any]:
    """Yield everything that the modules and methods of a class can name."""
    for base in kind.__mro__:
        there: list[Any] = list(vars(sys.modules.get(base.__module__, base)).values())
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else member
            if inspect.isfunction(function):
                there += inspect.getclosurevars(function).nonlocals.values()
        yield from there


def make_own(values: dict[str, Any]) -> None:
    """Replace what a group's hyperparameters share with those of another group, such as a learning rate that is a
    tensor, by copies."""
    values.update(copy.deepcopy(values))
