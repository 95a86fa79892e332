"""Values of torch's own types that are no tensors: dtypes, sizes and devices. Nothing here imports torch: whoever saves
or restores such a value has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import InvalidOption
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    import torch

    from asyncckpt.jsontree.decode import Decoder
    from asyncckpt.jsontree.encode import Encoder


def rows(torch: Any, tensor: Callable[[Any, Any], JsonValue]) -> dict[type, Callable[[Any, Any], JsonValue]]:
    """Return how values of torch's types are encoded, by type. ``tensor`` encodes tensors."""
    return {
        torch.Tensor: tensor,
        torch.nn.Parameter: tensor,
        torch.dtype: lambda _, v: {"$": "dtype", "v": str(v).removeprefix("torch.")},
        torch.Size: _size,
        torch.device: lambda _, v: {"$": "device", "v": [v.type, v.index]},
    }


def _size(encoder: Encoder, value: torch.Size) -> JsonValue:
    return {"$": "Size", "v": encoder.items(value)}


def to_dtype(decoder: Decoder, name: Any) -> torch.dtype:
    there = _torch()
    # vars, not getattr, which would make torch import a module that the tree names
    found: Any = vars(there).get(name) if type(name) is str else None
    if type(found) is not there.dtype or str(found) != f"torch.{name}":  # aliases such as half are never written
        decoder.fail(f"the torch dtype {name!r:.40} is unknown")
    dtype: torch.dtype = found
    return dtype


def to_size(decoder: Decoder, sizes: list[Any]) -> torch.Size:
    if not all(type(size) is int and -1 << 63 <= size < 1 << 63 for size in sizes):
        decoder.fail("a torch.Size of something else than sizes")
    size: torch.Size = _torch().Size(sizes)
    return size


def to_device(decoder: Decoder, tree: Any) -> torch.device:
    kind, index = tree if type(tree) is list and len(tree) == 2 else (None, None)
    # torch keeps the index in 8 bits and wraps larger ones silently
    if type(kind) is not str or not (index is None or (type(index) is int and 0 <= index < 128)):
        decoder.fail("a device that is no name and index")
    make = _torch().device
    try:
        device: torch.device = make(kind) if index is None else make(kind, index)
    except RuntimeError:
        decoder.fail(f"the device {kind!r:.40} is unknown")
    return device


def _torch() -> Any:
    torch = loaded_torch()
    if torch is None:
        raise InvalidOption("the plain values hold a dtype, size or device of torch: import torch, then decode them")
    return torch
