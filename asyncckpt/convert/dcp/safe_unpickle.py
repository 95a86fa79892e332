"""Pickles that torch wrote, and the ``torch.save`` archives around them, are read here without executing them.

The unpicklers find no class and no function by name but those listed below. Metadata gets stand-ins for anything else,
which only remember what they were given; values that need anything else are refused. So a forged pickle finds nothing
to call.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import torch

from asyncckpt.convert.torch_archive import TorchArchive, end_of, is_place
from asyncckpt.convert.torch_pickle import STORAGES, PatientUnpickler, Storage, latin1
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue
from asyncckpt.state.dtypes import CODES

#: The limit holds for one value, and for all that a tensor's file says beside its data.
_MAX_VALUE_BYTES: Final = 64 << 20
#: The limit holds for the objects in one value: through references a few bytes can make more than any memory holds.
_MAX_OBJECTS: Final = 1_000_000
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
_STORAGES: Final = {name: dtype for name, dtype in STORAGES.items() if dtype in CODES}
#: Makes the tensor of a storage, and of an offset, a size and a stride in elements.
Storages = Callable[[Storage, Any], torch.Tensor]


# -- what pickles may make -------------------------------------------------------------------------------------------
class Inert:
    """An ``Inert`` stands for an object of any class that a pickle names; it remembers its arguments and does
    nothing."""

    args: tuple[Any, ...]
    fields: dict[str, Any]

    def __new__(cls, *args: Any) -> Self:
        self = super().__new__(cls)
        self.args = args
        self.fields = {}
        return self

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state
        else:
            self.args = (state,)


class MetadataStandIn(Inert):
    """Stands for the metadata of a whole checkpoint."""


class BytesStandIn(Inert):
    """Stands for the metadata of an entry that is not a tensor."""


_STAND_INS: Final[dict[tuple[str, str], type[Inert]]] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): MetadataStandIn,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): BytesStandIn,
}


def _size(*sizes: Any) -> torch.Size:
    return torch.Size(*sizes)


_SAFE: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): latin1,
    ("torch", "Size"): _size,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(PatientUnpickler):
    """Finds nothing but what is listed. Without ``storages``, as for metadata, everything else becomes a stand-in."""

    built = (Inert, collections.OrderedDict)

    def __init__(self, data: bytes, storages: Storages | None = None) -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (known := _SAFE.get((module, name))) is not None:
            return known
        if self._storages is None:
            return _STAND_INS.get((module, name), Inert)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        raise UnsupportedValue(f"refers to {module}.{name}, which is not looked up")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise pickle.UnpicklingError("a persistent id that is no storage")
        return Storage(dtype, key)

    def _rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        if self._storages is None or not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor of no storage")
        return self._storages(storage, (offset, size, stride))


def unpickle(data: bytes, what: str, storages: Storages | None = None) -> Any:
    try:
        return _Unpickler(data, storages).load()
    except UnsupportedValue as error:
        raise UnsupportedValue(f"{what}: {error}") from None
    except CheckpointDamaged:
        raise
    except Exception as error:  # a forger's opcodes can run into anything
        raise CheckpointDamaged(f"{what}: cannot be read ({type(error).__name__}: {error!s:.200})") from error


# -- what torch.save writes ------------------------------------------------------------------------------------------
def _archive(data: memoryview, what: str) -> TorchArchive:
    return TorchArchive(
        _Mapped(data), lambda at, count: bytes(data[at : at + count]), len(data), what, _MAX_VALUE_BYTES
    )


class _Mapped(io.RawIOBase):
    """Presents mapped bytes as a file, without copying them."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, len(self._data))[whence] + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else min(len(self._data), self._at + size)
        part = bytes(self._data[self._at : end])
        self._at = max(self._at, end)
        return part


def tensor_in(data: memoryview, what: str) -> torch.Tensor:
    archive = _archive(data, what)
    found = unpickle(archive.pickle, what, _views(data, archive, what))
    if not isinstance(found, torch.Tensor):
        raise CheckpointDamaged(f"{what}: should be a tensor, and is a {type(found).__name__}")
    return found


def _views(data: memoryview, archive: TorchArchive, what: str) -> Callable[[Storage, Any], torch.Tensor]:
    def view(storage: Storage, place: Any) -> torch.Tensor:
        offset, size, stride = place
        if not is_place(offset, size, stride):
            raise CheckpointDamaged(f"{what}: a malformed tensor")
        begin, nbytes = archive.storage(storage.key)
        if 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        end = end_of(offset, size, stride) * storage.dtype.itemsize
        if end > nbytes:
            raise CheckpointDamaged(f"{what}: its data is cut off")
        flat = torch.frombuffer(data[begin : begin + end], dtype=storage.dtype)
        return flat.as_strided(size, stride, offset)

    return view


def value_in(data: memoryview, what: str) -> Any:
    if len(data) > _MAX_VALUE_BYTES:
        raise UnsupportedValue(f"{what}: a value of {len(data)} bytes, over the limit of {_MAX_VALUE_BYTES}")
    archive = _archive(data, what)
    value = unpickle(archive.pickle, what, _views(data, archive, what))
    stack, seen = [value], 0
    while stack:
        node = stack.pop()
        seen += 1
        if seen > _MAX_OBJECTS:
            raise UnsupportedValue(f"{what}: over {_MAX_OBJECTS} objects")
        if isinstance(node, Inert | Storage | torch.Tensor):
            raise UnsupportedValue(f"{what}: holds a {type(node).__name__}")
        if isinstance(node, Mapping):
            stack += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set | frozenset):
            stack += node
    return value
