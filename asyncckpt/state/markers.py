"""Markers are what users put around values of a state: ``LocalShard`` for a part of a tensor, ``Replicated`` for a
value that is the same on every rank, ``Owner`` for one that is right on one rank, ``PerRank`` for one that each rank
has of its own, with a rule for jobs of another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from asyncckpt.errors import InvalidOption


class Replicated:
    """Marks a component that is the same on every rank of the job, so that it is stored once.

    ``value``: an object with ``state_dict`` and ``load_state_dict``, or plain data. Each rank writes a part of its
    tensors. Without this marker every rank's own value is stored, as a data loader or an ``RngState`` needs. After a
    restore, the attribute ``value`` holds the data where it was plain.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        """Return the state of ``value``, or ``value`` itself where it is plain data."""
        return self.value.state_dict() if hasattr(self.value, "state_dict") else {"value": self.value}

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Give ``value`` the state that ``state_dict`` has returned, or replace it where it is plain data."""
        if hasattr(self.value, "load_state_dict"):
            return self.value.load_state_dict(state_dict)
        self.value = state_dict["value"]
        return None


class PerRank:
    """Marks a component that each rank of the job has of its own, and says what becomes of it in a job of another
    size: a data loader's position, say. Without this marker a rank that the checkpoint knows no state of is refused.

    ``value``: an object with ``state_dict`` and ``load_state_dict``. ``rule(states, rank, size)``: returns what
    ``rank`` of ``size`` ranks takes over, given the states of all ranks that saved, in their order. It is called on
    each rank, and only where the job has another size than the one that saved. Raises ``InvalidOption`` for another
    value or rule.
    """

    def __init__(self, value: Any, rule: Callable[[list[Any], int, int], Any]) -> None:
        if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
            raise InvalidOption(f"PerRank takes an object with state_dict and load_state_dict, not {value!r:.80}")
        if not callable(rule):
            raise InvalidOption(f"PerRank(…, rule) takes a function of (states, rank, size), not {rule!r:.80}")
        self.value = value
        self.rule = rule

    def state_dict(self) -> Any:
        """Return the state of ``value``."""
        return self.value.state_dict()

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Give ``value`` a state of its own."""
        return self.value.load_state_dict(state_dict)


class Owner:
    """Marks a component of which one rank has the right values, and others may have copies that differ: an EMA that
    rank 0 alone updates, say, or parameters that the ranks average now and then.

    ``value``: a module, an optimizer, a tensor, an object with ``state_dict`` and ``load_state_dict``, or plain data.
    What ``rank`` has of it is stored, once, and every rank of any later job gets that; of tensors that the ranks hold
    in parts, those rows that ``rank`` has no copy of come from the first rank that has one. In a process that is alone
    it makes no difference. After a restore, the attribute ``value`` holds the data where it was plain. Raises
    ``InvalidOption`` for a ``rank`` that none can have; a save raises it for one that the job does not have.
    """

    def __init__(self, value: Any, *, rank: int = 0) -> None:
        if type(rank) is not int or rank < 0:
            raise InvalidOption(f"Owner(rank=…) must be a rank's number, not {rank!r}")
        self.value = value
        self.rank = rank


class _WithoutOwners(dict[str, Any]):
    """A state whose components are not marked; a component that is set becomes the marked one's value."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__({name: value.value if isinstance(value, Owner) else value for name, value in state.items()})
        self._marked = state

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        owner = self._marked.get(name)
        if isinstance(owner, Owner):
            owner.value = value
        elif isinstance(self._marked, dict):
            self._marked[name] = value


def without_owners(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, int]]:
    """Return the state without ``Owner`` around its components, and the owner's rank of each that had one. To set a
    component of what is returned sets it in ``state``."""
    owners = {name: value.rank for name, value in state.items() if isinstance(value, Owner)}
    return (_WithoutOwners(state) if owners else state), owners


def without_shards(value: Any, found: dict[int, LocalShard]) -> Any:
    """Return ``value`` with each ``LocalShard`` in its dicts, lists and tuples replaced by the tensor it holds. Each
    one is added to ``found`` under the ``id`` of that tensor."""
    if isinstance(value, LocalShard):
        found[id(value.tensor)] = value
        return value.tensor
    if type(value) is dict:
        new = {key: without_shards(item, found) for key, item in value.items()}
        return new if found else value
    if type(value) in (list, tuple):
        items = [without_shards(item, found) for item in value]
        return type(value)(items) if found else value
    return value


class LocalShard:
    """Marks a plain tensor as this rank's part of a global one, for sharding that is not DTensor's (Megatron's layers,
    say). Put it where the tensor would stand in the state.

    ``tensor`` is this rank's part, ``global_shape`` the shape of the whole tensor, and ``offsets`` say where the part
    begins in it, one index for each dimension. Parts may differ in size, be empty, or be held by several ranks;
    together they must cover the tensor. A part must be made of whole rows: it spans every dimension but the first.
    Raises ``InvalidOption`` for a part that is not, or that does not lie in the global tensor.
    """

    __slots__ = ("global_shape", "offsets", "tensor")

    def __init__(self, tensor: torch.Tensor, global_shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        shape = tuple(tensor.shape)
        if len(shape) != len(global_shape) or len(shape) != len(offsets) or not shape:
            raise InvalidOption(
                f"LocalShard: tensor {list(shape)}, global_shape {list(global_shape)} and offsets {list(offsets)} must "
                f"have the same number of dimensions, at least one"
            )
        ends = zip(offsets, shape, global_shape, strict=True)
        if any(begin < 0 or begin + size > whole for begin, size, whole in ends):
            raise InvalidOption(f"LocalShard: {list(shape)} at {list(offsets)} does not lie in {list(global_shape)}")
        if tensor.numel() and shape[1:] != tuple(global_shape[1:]):
            raise InvalidOption(
                f"LocalShard: a part {list(shape)} of {list(global_shape)} is split along another dimension than the "
                f"first. Give whole rows: pass the transposed tensor, or use a DTensor, which is redistributed"
            )
        self.tensor = tensor
        self.global_shape = tuple(global_shape)
        self.offsets = tuple(offsets)

    def __repr__(self) -> str:
        return f"LocalShard({list(self.tensor.shape)} of {list(self.global_shape)} at {list(self.offsets)})"


def with_shards(value: Any, shards: Mapping[int, LocalShard]) -> Any:
    """Return ``value`` with each tensor whose ``id`` is in ``shards`` replaced by its ``LocalShard``. Undoes
    ``without_shards``."""
    if isinstance(value, torch.Tensor):
        return shards.get(id(value), value)
    if not shards:
        return value
    if type(value) is dict:
        return {key: with_shards(item, shards) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_shards(item, shards) for item in value)
    return value
