"""A tensor is captured as a piece: its specification, and a reference to it or to the rows of it that are here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from asyncckpt.errors import UnsupportedValue
from asyncckpt.memory.tensor_bytes import is_dense
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor, local_rows, sharded_tensor_rows
from asyncckpt.state.dtypes import CODES
from asyncckpt.state.fsdp1 import FlatTensor
from asyncckpt.state.markers import LocalShard
from asyncckpt.state.wrappers import PLAIN_TYPES, hides_values
from asyncckpt.types import LocalTensor, TensorSpec

Sink = Callable[[str, torch.Tensor], None]


def strides_of(pieces: list[LocalTensor]) -> dict[str, tuple[int, ...]]:
    """Return the strides of the whole tensors that fill their memory in another order than row-major."""
    return {
        piece.spec.name: piece.tensor.stride()
        for piece in pieces
        if not piece.tensor.is_contiguous()  # first, because it is what nearly all tensors are
        and piece.rows is None
        and piece.span is None
        and is_dense(piece.tensor.shape, piece.tensor.stride())
    }


def sink(
    component: str, pieces: list[LocalTensor], shards: Mapping[int, LocalShard | FlatTensor] = MappingProxyType({})
) -> Sink:
    def add(name: str, tensor: torch.Tensor) -> None:
        shard = shards.get(id(tensor))
        if shard is None:
            pieces.append(piece_of(component, name, tensor))
        elif isinstance(shard, FlatTensor):
            pieces.append(_flat_piece(component, name, shard))
        else:
            pieces.append(_shard_piece(component, name, shard))

    return add


def piece_of(component: str, name: str, tensor: torch.Tensor, *, frozen: bool = False) -> LocalTensor:
    """Return the tensor, or this rank's rows of it, as one piece. ``frozen``: training does not change it. Raises
    ``UnsupportedValue`` for a tensor that cannot be stored as dense bytes."""
    if is_distributed(tensor) or is_sharded_tensor(tensor):
        return _distributed_piece(component, name, tensor, frozen)
    if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided or tensor.is_meta:
        _check_storable(f"state[{component!r}][{name!r}]", tensor)
    return LocalTensor(_spec(component, name, tensor.dtype, tensor.shape, frozen), tensor)


def _distributed_piece(component: str, name: str, tensor: Any, frozen: bool) -> LocalTensor:
    where = f"state[{component!r}][{name!r}]"
    split = local_rows if is_distributed(tensor) else sharded_tensor_rows
    local = split(tensor, where)
    if hides_values(local.tensor):
        raise UnsupportedValue(
            f"{where}: a DTensor whose local part is a {type(local.tensor).__name__} is not stored, because its parts "
            f"do not follow the rows that ranks hold. Use an optimizer, or weights, of plain tensors where modules are "
            f"sharded, or a job of one rank without sharding"
        )
    shape = tensor.shape if is_distributed(tensor) else tensor.metadata().size
    spec = _spec(component, name, local.tensor.dtype, shape, frozen)
    begin = local.first * local.tensor.dtype.itemsize
    gather = tensor.full_tensor if is_distributed(tensor) else None
    return LocalTensor(spec, local.tensor, begin, local.rows, None, local.private, gather, local.redistribute)


def _shard_piece(component: str, name: str, shard: LocalShard) -> LocalTensor:
    spec = _spec(component, name, shard.tensor.dtype, torch.Size(shard.global_shape), False)
    rows = shard.global_shape[0]
    first, count = shard.offsets[0], shard.tensor.shape[0] if shard.tensor.numel() else 0
    return LocalTensor(spec, shard.tensor, spec.nbytes // rows * first if rows else 0, span=(first, first + count))


def _flat_piece(component: str, name: str, flat: FlatTensor) -> LocalTensor:
    part, tensor = flat.part, flat.tensor
    spec = _spec(component, name, tensor.dtype, torch.Size(part.shape), False)
    return LocalTensor(spec, tensor, part.first * tensor.dtype.itemsize, part.owners)


@functools.lru_cache(maxsize=1 << 20)
def _spec(component: str, name: str, dtype: torch.dtype, shape: torch.Size, frozen: bool) -> TensorSpec:
    """Return the specification of a tensor. It is cached because a training state has the same names and shapes at
    every save, and this runs on the training thread."""
    code = CODES.get(dtype)
    if code is None:
        raise UnsupportedValue(
            f"state[{component!r}][{name!r}]: dtype {dtype} has no safetensors code; convert it (complex128: "
            f"torch.view_as_real; quantized: store int_repr() and the scales)"
        )
    return TensorSpec(name, code, tuple(shape), shape.numel() * dtype.itemsize, frozen)


def _check_storable(where: str, tensor: torch.Tensor) -> None:
    if tensor.layout is torch.jagged:
        raise UnsupportedValue(f"{where}: layout {tensor.layout} is not stored; store its values() and offsets()")
    if tensor.layout is not torch.strided:
        raise UnsupportedValue(f"{where}: layout {tensor.layout} is not stored; call .to_dense() or store its parts")
    if tensor.is_meta:
        raise UnsupportedValue(f"{where}: a tensor on the meta device has no values to save")
    _check_subclass(tensor, where)


def _check_subclass(tensor: torch.Tensor, where: str) -> None:
    # a subclass that computes or hides its values, and does not say which tensors it wraps, has no bytes to copy
    if hides_values(tensor):
        raise UnsupportedValue(
            f"{where}: tensors of type {type(tensor).__name__} are not stored, because the class does not say what "
            f"is inside. Give it __tensor_flatten__ and __tensor_unflatten__, or store a plain tensor: leave it out "
            f"of the state, or give the object that holds it state_dict and load_state_dict"
        )
