"""A module whose tree, names and hooks are as they were gives the same ``state_dict`` again: its own dicts are read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from asyncckpt.protocols import LiesInFile
from asyncckpt.state.fqn import canonical_names
from asyncckpt.types import ComponentSnapshot

#: A module or a class that has one of these of its own may give another ``state_dict`` each time.
_OVERRIDES = (
    "state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "named_parameters",
    "named_buffers",
    "named_modules",
    "_named_members",
    "__getattribute__",
)
_OWN: dict[str, Any] = {name: getattr(nn.Module, name) for name in _OVERRIDES}

_children: Callable[[nn.Module], dict[str, Any]] = operator.attrgetter("_modules")
_parameters: Callable[[nn.Module], dict[str, Any]] = operator.attrgetter("_parameters")
_buffers: Callable[[nn.Module], dict[str, Any]] = operator.attrgetter("_buffers")
_transient: Callable[[nn.Module], set[str]] = operator.attrgetter("_non_persistent_buffers_set")
_hooks: Callable[[nn.Module], Any] = operator.attrgetter("_state_dict_hooks")
_pre_hooks: Callable[[nn.Module], Any] = operator.attrgetter("_state_dict_pre_hooks")


class NotVouched(Exception):
    """Nobody can vouch that a component is what it was when it was captured: ``str`` of the error says why.
    ``component``: its name, empty where it is the state as a whole. It never leaves the package."""

    component = ""


def _one_after_another(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


def _tree(root: nn.Module) -> tuple[list[nn.Module], list[dict[str, Any]], list[type]]:
    """Return a module and all below it, level by level, as often as there are ways to it, with the children of each,
    and the types of all children, of those that are None, too."""
    modules, children, types = [root], [], [type(root)]
    level = [root]
    while level:
        below = list(map(_children, level))
        children += below
        values = _one_after_another(below)
        types += map(type, values)
        level = [one for one in values if one is not None]
        modules += level
    return modules, children, types


def _names(dicts: Sequence[dict[str, Any]]) -> tuple[list[str], list[int]]:
    return list(chain.from_iterable(dicts)), list(map(len, dicts))


class KnownModule:
    """Knows a module that was captured as ``component``, and keeps nothing of it alive. For the training thread.

    ``positions``: where the tensors of the component's pieces stand among the ``values``, in order; ``skipped``: where
    buffers do that are not stored. Raises ``NotVouched``.
    """

    def __init__(self, module: nn.Module, component: ComponentSnapshot) -> None:
        if component.tree != {}:
            raise NotVouched("its state_dict holds more than plain tensors")
        if isinstance(module, LiesInFile):
            raise NotVouched("it says itself which file it lies in")
        try:
            modules, children, self._types = _tree(module)
            dicts = [*children, *map(_parameters, modules), *map(_buffers, modules)]
        except (AttributeError, TypeError):
            raise NotVouched("a module in it keeps its parts in a way of its own") from None
        self._classes = tuple(dict.fromkeys(map(type, modules)))
        for owner in [one for one in self._classes if not _is_plain(one)]:
            raise NotVouched(f"{owner.__name__} overrides how its state is read")
        if set(map(type, dicts)) != {dict}:
            raise NotVouched("a module in it keeps its parts in a way of its own")
        if any(vars(one).keys() & _OVERRIDES for one in modules):
            raise NotVouched("a module in it has a state_dict of its own")
        if any(map(_hooks, modules)) or any(map(_pre_hooks, modules)):
            raise NotVouched("hooks on its state_dict may change what that returns")
        parameters, buffers = list(map(_parameters, modules)), list(map(_buffers, modules))
        self._child_names, self._parameter_names, self._buffer_names = (
            _names(children),
            _names(parameters),
            _names(buffers),
        )
        self._transient = [frozenset(one) for one in map(_transient, modules)]
        self._any_transient = any(self._transient)
        self._attributes = list(map(len, map(vars, modules)))
        values = _one_after_another(parameters) + _one_after_another(buffers)
        keys = _keys(modules, children, parameters, buffers)
        self.positions = _positions(module, component, keys, values)
        self.skipped = [
            at for at, (key, value) in enumerate(zip(keys, values, strict=True)) if key is None and value is not None
        ]

    def values(self, module: nn.Module) -> list[Any]:
        """Return all parameters and buffers, and None where there are none, in the order in which they are known.
        Raises ``NotVouched`` where something else than the tensors may have changed."""
        modules, children, types = _tree(module)
        if types != self._types or _names(children) != self._child_names:
            raise NotVouched("modules in it were added, removed or exchanged")
        if not all(map(_is_plain, self._classes)):
            raise NotVouched("a class of a module in it overrides by now how its state is read")
        parameters, buffers = list(map(_parameters, modules)), list(map(_buffers, modules))
        if _names(parameters) != self._parameter_names or _names(buffers) != self._buffer_names:
            raise NotVouched("parameters or buffers were added, removed or renamed")
        transient = map(_transient, modules)
        if any(transient) if not self._any_transient else list(transient) != self._transient:
            raise NotVouched("buffers have become persistent, or are not any more")
        if any(map(_hooks, modules)) or any(map(_pre_hooks, modules)):
            raise NotVouched("hooks on its state_dict may change what that returns")
        attributes = list(map(len, map(vars, modules)))
        if attributes != self._attributes:
            if any(vars(one).keys() & _OVERRIDES for one in modules):
                raise NotVouched("a module in it has a state_dict of its own by now")
            self._attributes = attributes
        return _one_after_another(parameters) + _one_after_another(buffers)


def _is_plain(owner: type) -> bool:
    """Whether instances of a module's class are read as ``nn.Module`` says."""
    return all(getattr(owner, name, None) is own for name, own in _OWN.items())


def _keys(
    modules: Sequence[nn.Module],
    children: Sequence[dict[str, Any]],
    parameters: Sequence[dict[str, Any]],
    buffers: Sequence[dict[str, Any]],
) -> list[str | None]:
    """Return the key in ``state_dict`` of each of a module's values; None of those that it leaves out."""
    prefixes = [""]
    for at, below in enumerate(children):
        prefixes += [f"{prefixes[at]}{name}." for name, child in below.items() if child is not None]
    keys: list[str | None] = []
    for prefix, held in zip(prefixes, parameters, strict=True):
        keys += [prefix + name if value is not None else None for name, value in held.items()]
    for prefix, held, module in zip(prefixes, buffers, modules, strict=True):
        transient = _transient(module)
        keys += [prefix + name if value is not None and name not in transient else None for name, value in held.items()]
    return keys


def _positions(
    module: nn.Module, component: ComponentSnapshot, keys: Sequence[str | None], values: Sequence[Any]
) -> list[int]:
    """Return where the pieces of a component stand among a module's values. Raises ``NotVouched`` where what was
    captured is not what the module holds."""
    names: Mapping[str, str] = canonical_names(module, [key for key in keys if key is not None])
    at = {names[key]: index for index, key in enumerate(keys) if key is not None}
    stored = [piece.spec.name for piece in component.pieces]
    if at.keys() != {*stored, *component.aliases}:
        raise NotVouched("its state_dict has other names than its parameters and buffers")
    for piece in component.pieces:
        held = values[at[piece.spec.name]]
        if held.data_ptr() != piece.tensor.data_ptr() or held.shape != piece.tensor.shape:
            raise NotVouched("its state_dict has other tensors than its parameters and buffers")
    return [at[name] for name in stored]
