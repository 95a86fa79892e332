"""An optimizer whose parameters and keys are as they were has the same ``state_dict``: its own dicts are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.state.known_modules import NotVouched
from asyncckpt.state.optimizer import object_state, rename_group_tensors
from asyncckpt.state.pieces import sink
from asyncckpt.state.zero_redundancy import local_optimizer
from asyncckpt.types import ComponentSnapshot, JsonValue, LocalTensor

_OVERRIDES = ("state_dict", "__getattribute__", "__getstate__")
_OWN: dict[str, Any] = {name: getattr(torch.optim.Optimizer, name) for name in _OVERRIDES}


class KnownOptimizer:
    """Knows an optimizer that was captured as ``component``, and keeps nothing of it alive. For the training thread.

    ``positions``: where the tensors of the state's pieces stand among the ``values``, in order. ``loose``: how many
    pieces come after those, of tensors in parameter groups, which are captured each time. Raises ``NotVouched``.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, component: ComponentSnapshot) -> None:
        self.name = name
        tree: Any = component.tree
        if component.kind != "optimizer" or not isinstance(tree, dict) or list(tree) != ["state", "param_groups"]:
            raise NotVouched(f"the state_dict of {type(optimizer).__name__} has a form of its own")
        if local_optimizer(name, optimizer) is not optimizer:
            raise NotVouched("a ZeroRedundancyOptimizer has another optimizer inside")
        _check(optimizer)
        self._type = type(optimizer)
        self._tree: JsonValue = tree["state"]
        self._parameters: list[list[str]] = [list(names) for names in component.parameters]
        self._groups = list(map(len, _group_parameters(optimizer)))
        self._names = [group.get("param_names") for group in tree["param_groups"]]
        self._parameter_ids = _parameter_ids(optimizer)
        self._holders, self._counts, self._keys = _state_names(optimizer)
        if not set(self._holders) <= set(self._parameter_ids):
            raise NotVouched("its state has more than that of its parameters")
        values = _state_values(optimizer)
        held = [piece for piece in component.pieces if piece.spec.name.startswith("state.")]
        if len(held) != len(values) or component.pieces[: len(held)] != held:
            raise NotVouched("its state has more than plain tensors")
        for piece, value in zip(held, values, strict=True):
            if piece.tensor is not value:
                raise NotVouched("its state has more than plain tensors")
        self.positions = list(range(len(values)))
        self.skipped: list[int] = []
        self.loose = len(component.pieces) - len(held)

    def values(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Return the tensors of the state and, after them, the parameters, in the order in which they are known. Raises
        ``NotVouched`` where something else than the tensors may have changed."""
        if type(optimizer) is not self._type:
            raise NotVouched("another kind of optimizer has taken its place")
        _check(optimizer)
        held = _group_parameters(optimizer)
        if list(map(len, held)) != self._groups or _parameter_ids(optimizer) != self._parameter_ids:
            raise NotVouched("its parameter groups hold other parameters")
        holders, counts, keys = _state_names(optimizer)
        if (
            holders != self._holders
            or counts != self._counts
            or keys != self._keys
            or not set(map(type, keys)) <= {str}
        ):
            raise NotVouched("its state has other keys")
        return _state_values(optimizer)

    def parameters(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        """Return its parameters, group by group."""
        return list(chain.from_iterable(_group_parameters(optimizer)))

    def tree(self, optimizer: torch.optim.Optimizer) -> tuple[JsonValue, list[LocalTensor], Sequence[Sequence[str]]]:
        """Return the tree with the groups' values of now, the pieces of tensors in groups, and the names of the
        parameters by group. Raises as ``capture`` does."""
        known = zip(optimizer.param_groups, self._parameters, self._names, strict=True)
        groups = [_packed(group, names, given) for group, names, given in known]
        value = {"state": jsontree.Encoded(self._tree), "param_groups": groups}
        pieces: list[LocalTensor] = []
        tree = jsontree.encode(value, "", sink(self.name, pieces), component=self.name, objects=object_state)
        if pieces:
            rename_group_tensors(tree, pieces)
        return tree, pieces, self._parameters


def _packed(group: Mapping[str, Any], names: list[str], given: Any) -> dict[str, Any]:
    """Return a group as ``state_dict`` gives it, with its parameters' names. ``given``: what was stored of the names
    that the optimizer itself has of them."""
    packed = {key: value for key, value in group.items() if key != "params"}
    packed["params"] = jsontree.Encoded(list(names))
    own = packed.get("param_names")
    if type(own) is list and own == given and set(map(type, own)) == {str}:
        packed["param_names"] = jsontree.Encoded(given)
    return packed


def _check(optimizer: torch.optim.Optimizer) -> None:
    if any(getattr(type(optimizer), name, None) is not own for name, own in _OWN.items()):
        raise NotVouched(f"{type(optimizer).__name__} overrides how its state is read")
    attributes = vars(optimizer)
    if "state_dict" in attributes:
        raise NotVouched("it has a state_dict of its own")
    if attributes.get("_optimizer_state_dict_pre_hooks") or attributes.get("_optimizer_state_dict_post_hooks"):
        raise NotVouched("hooks on its state_dict may change what that returns")
    if type(optimizer.state) not in (dict, defaultdict):
        raise NotVouched("it keeps its state in a way of its own")
    if not {dict} >= set(map(type, optimizer.state.values())):
        raise NotVouched("its state has more than plain tensors")


def _group_parameters(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _parameter_ids(optimizer: torch.optim.Optimizer) -> list[int]:
    return list(map(id, chain.from_iterable(_group_parameters(optimizer))))


def _state_names(optimizer: torch.optim.Optimizer) -> tuple[list[int], list[int], list[str]]:
    """Return whose the entries of a state are, how many values each has, and the keys of all of them."""
    entries = optimizer.state.values()
    return list(map(id, optimizer.state)), list(map(len, entries)), list(chain.from_iterable(entries))


def _state_values(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, optimizer.state.values())))
