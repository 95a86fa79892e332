"""Marks that users put around values of a state: a part of a tensor, a value that is the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import InvalidOption


class Replicated:
    """A stateful object, or plain data, that is the same on every rank of the job: stored once, each rank writing a
    part of its tensors. Without this, each rank's is kept (data loaders, RNGs)."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value.state_dict() if hasattr(self.value, "state_dict") else {"value": self.value}

    def load_state_dict(self, state_dict: Any, /) -> Any:
        if hasattr(self.value, "load_state_dict"):
            return self.value.load_state_dict(state_dict)
        self.value = state_dict["value"]
        return None


def without_shards(value: Any, found: dict[int, Shard]) -> Any:
    """``value`` with each ``Shard`` in its dicts, lists and tuples replaced by its tensor; ``found`` remembers them by
    that tensor's ``id``."""
    if isinstance(value, Shard):
        found[id(value.tensor)] = value
        return value.tensor
    if type(value) is dict:
        new = {key: without_shards(item, found) for key, item in value.items()}
        return new if found else value
    if type(value) in (list, tuple):
        items = [without_shards(item, found) for item in value]
        return type(value)(items) if found else value
    return value


class Shard:
    """A plain tensor that is a part of a global one, for sharding that is not DTensor's (Megatron's layers, say).

    ``tensor``: this rank's part; ``global_shape``: of the whole; ``offsets``: where the part begins in it, one number a
    dimension. Parts may differ in size, be empty, or be held by several ranks; together they must cover the tensor.
    Only parts of whole rows (all of every dimension but the first) can be stored. Raises ``InvalidOption``.
    """

    __slots__ = ("global_shape", "offsets", "tensor")

    def __init__(self, tensor: torch.Tensor, global_shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        shape = tuple(tensor.shape)
        if len(shape) != len(global_shape) or len(shape) != len(offsets) or not shape:
            raise InvalidOption(
                f"Shard: tensor {list(shape)}, global_shape {list(global_shape)} and offsets {list(offsets)} must have "
                f"the same number of dimensions, at least one"
            )
        ends = zip(offsets, shape, global_shape, strict=True)
        if any(begin < 0 or begin + size > whole for begin, size, whole in ends):
            raise InvalidOption(f"Shard: {list(shape)} at {list(offsets)} does not lie in {list(global_shape)}")
        if tensor.numel() and shape[1:] != tuple(global_shape[1:]):
            raise InvalidOption(
                f"Shard: a part {list(shape)} of {list(global_shape)} is split along another dimension than the "
                f"first. Give whole rows: pass the transposed tensor, or use a DTensor, which is redistributed"
            )
        self.tensor = tensor
        self.global_shape = tuple(global_shape)
        self.offsets = tuple(offsets)

    def __repr__(self) -> str:
        return f"Shard({list(self.tensor.shape)} of {list(self.global_shape)} at {list(self.offsets)})"


def with_shards(value: Any, shards: Mapping[int, Shard]) -> Any:
    """The other way round of ``without_shards``."""
    if isinstance(value, torch.Tensor):
        return shards.get(id(value), value)
    if not shards:
        return value
    if type(value) is dict:
        return {key: with_shards(item, shards) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_shards(item, shards) for item in value)
    return value
