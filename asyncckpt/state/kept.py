"""A training state has the same names and tensors at every save. What ``capture`` has made of them is kept, so that the
next capture compares lists instead of making everything anew.

Nothing is assumed of a component. Names, types, dtypes, shapes and whatever else the result depends on are read and
compared at every capture, and where one differs the component is captured as if it were new. No tensor is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from asyncckpt.state.wrappers import PLAIN_TYPES
from asyncckpt.types import JsonValue, LocalTensor, TensorSpec


def _forms(tensors: Collection[torch.Tensor]) -> tuple[list[Any], ...]:
    """Return what the specifications of plain tensors are made of, and what makes them ones that can be stored."""
    # one list after the other: nothing is faster, neither tuples of all nor operator.attrgetter
    dtypes, shapes = [one.dtype for one in tensors], [one.shape for one in tensors]
    return dtypes, shapes, [one.layout for one in tensors], [one.is_meta for one in tensors]


@dataclass(frozen=True, slots=True)
class KeptTensors:
    """Holds the specifications of plain tensors that were captured in order. ``forms``: what they were made of."""

    forms: tuple[list[Any], ...]
    specs: list[TensorSpec]

    def fits(self, tensors: Collection[Any]) -> bool:
        """Whether these are as many plain tensors, of the same dtypes and shapes in the same order."""
        return set(map(type, tensors)) <= PLAIN_TYPES and _forms(tensors) == self.forms


def _kept(tensors: Collection[Any], specs: Sequence[TensorSpec]) -> KeptTensors | None:
    if len(tensors) != len(specs) or not set(map(type, tensors)) <= PLAIN_TYPES:
        return None
    return KeptTensors(_forms(tensors), list(specs))


# -- the state of an optimizer ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeptState:
    """Holds what was made of an optimizer's state, by the name of each parameter a dict of plain tensors alone.
    ``keys``: those of all these dicts, one after the other. ``tree``: the state, encoded."""

    names: list[str]
    counts: list[int]
    keys: list[str]
    tensors: KeptTensors
    tree: JsonValue

    def pieces(self, state: Mapping[str, Any]) -> list[LocalTensor] | None:
        """Return the pieces of ``state``, or None where it differs in more than values."""
        found = _flat(state)
        if found is None:
            return None
        names, counts, keys, tensors = found
        if names != self.names or counts != self.counts or keys != self.keys or not self.tensors.fits(tensors):
            return None
        return list(map(LocalTensor, self.tensors.specs, tensors))


def keep_state(state: Mapping[str, Any], pieces: Sequence[LocalTensor], tree: JsonValue) -> KeptState | None:
    """Keep what was made of ``state``: its pieces and its tree. Return None where it has more than plain tensors."""
    found = _flat(state)
    if found is None:
        return None
    tensors = _kept(found[3], [piece.spec for piece in pieces])
    return KeptState(found[0], found[1], found[2], tensors, tree) if tensors is not None else None


def _flat(state: Mapping[str, Any]) -> tuple[list[str], list[int], list[str], list[Any]] | None:
    """Return the names, and the number of values, the keys and the values of all entries one after the other; None
    where an entry is no dict, or a name or key is no ``str``."""
    names, entries = list(state), list(state.values())
    if set(map(type, entries)) != {dict}:
        return None
    keys = list(chain.from_iterable(entries))
    if set(map(type, names)) != {str} or not set(map(type, keys)) <= {str}:
        return None
    return names, list(map(len, entries)), keys, [value for entry in entries for value in entry.values()]


# -- modules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeptModule:
    """Holds what was made of a module whose ``state_dict`` has plain tensors alone.

    ``fqns``: of all keys in order. ``twins``: for each tensor the index of the first that begins at the same address.
    ``places``: strides and devices of those that share one. ``frozen``: for each tensor whether it is; None where none
    is. ``chosen``: the indexes of those that are pieces, the others being ``aliases``."""

    fqns: list[str]
    tensors: KeptTensors
    twins: list[int]
    places: list[Any]
    frozen: list[bool] | None
    chosen: list[int]
    specs: list[TensorSpec]
    aliases: Mapping[str, str]

    def pieces(
        self, fqns: list[str], values: Sequence[Any], frozen: Collection[int], buffers: Collection[str]
    ) -> list[LocalTensor] | None:
        """Return the pieces of a ``state_dict`` with these names and values, or None where it differs in more than what
        the tensors hold. ``frozen``: the addresses of frozen parameters; ``buffers``: the names of buffers."""
        if fqns != self.fqns or not self.tensors.fits(values):
            return None
        addresses = [value.data_ptr() for value in values]
        if _twins(addresses) != self.twins or _places(values, self.twins) != self.places:
            return None
        if _frozen(addresses, frozen) != self.frozen:
            return None
        tensors = values if len(self.chosen) == len(values) else [values[index] for index in self.chosen]
        pieces = list(map(LocalTensor, self.specs, tensors))
        mark_buffers(pieces, buffers)
        return pieces


def keep_module(
    fqns: list[str],
    values: Sequence[Any],
    frozen: Collection[int],
    pieces: Sequence[LocalTensor],
    aliases: Mapping[str, str],
) -> KeptModule | None:
    """Keep what was made of a ``state_dict``, as ``KeptModule.pieces`` takes it: its pieces and aliases. Return None
    where it has more than plain tensors."""
    chosen = [index for index, fqn in enumerate(fqns) if fqn not in aliases]
    by_name = {piece.spec.name: piece.spec for piece in pieces}
    specs = [by_name[fqn] for fqn in fqns if fqn in by_name]
    if len(chosen) != len(specs):
        return None
    tensors = _kept(values, [by_name[aliases.get(fqn, fqn)] for fqn in fqns])
    if tensors is None:
        return None
    addresses = [value.data_ptr() for value in values]
    twins = _twins(addresses)
    places, still = _places(values, twins), _frozen(addresses, frozen)
    return KeptModule(fqns, tensors, twins, places, still, chosen, specs, dict(aliases))


def mark_buffers(pieces: Sequence[LocalTensor], buffers: Collection[str]) -> None:
    """Note which pieces are buffers."""
    if buffers:
        for piece in pieces:
            piece.first_only = piece.spec.name in buffers


def _twins(addresses: Sequence[int]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(address, index) for index, address in enumerate(addresses)]


def _places(tensors: Sequence[torch.Tensor], twins: Sequence[int]) -> list[Any]:
    if len(set(twins)) == len(twins):
        return []
    shared = {first for index, first in enumerate(twins) if first != index}
    chosen = [tensor for tensor, first in zip(tensors, twins, strict=True) if first in shared]
    return [(tensor.stride(), tensor.device) for tensor in chosen]


def _frozen(addresses: Sequence[int], frozen: Collection[int]) -> list[bool] | None:
    return [address in frozen for address in addresses] if frozen else None


class KeptCaptures:
    """Keeps what the last capture of each component has made, by the component's name. For the training thread."""

    def __init__(self) -> None:
        self.modules: dict[str, KeptModule] = {}
        self.states: dict[str, KeptState] = {}
