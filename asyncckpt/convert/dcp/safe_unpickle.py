"""Pickles that torch wrote, and the ``torch.save`` archives around them, are read here without executing them.

The unpicklers find no class and no function by name but those listed below. Metadata gets stand-ins for anything else,
which only remember what they were given; values that need anything else are refused. So a forged pickle finds nothing
to call.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import torch

from asyncckpt.convert.torch_pickle import PatientUnpickler
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue
from asyncckpt.state.dtypes import CODES

#: The limit holds for one value, and for all that a tensor's file says beside its data.
_MAX_VALUE_BYTES: Final = 64 << 20
#: The limit holds for the objects in one value: through references a few bytes can make more than any memory holds.
_MAX_OBJECTS: Final = 1_000_000
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
_STORAGES: Final = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
#: Makes the tensor of a storage, and of an offset, a size and a stride in elements.
Storages = Callable[["StorageStandIn", Any], torch.Tensor]


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


class StorageStandIn:
    """Stands for a storage of a saved tensor; it knows the dtype, and the name of the bytes in the archive."""

    def __init__(self, dtype: torch.dtype, key: str) -> None:
        self.dtype = dtype
        self.key = key


_STAND_INS: Final[dict[tuple[str, str], type[Inert]]] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): MetadataStandIn,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): BytesStandIn,
}


def _latin1(text: Any, encoding: Any) -> bytes:
    """Make bytes of the text that pickles of protocol 2 hold them as."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an odd encoding")
    return text.encode("latin1")


def _size(*sizes: Any) -> torch.Size:
    return torch.Size(*sizes)


_SAFE: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): _latin1,
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

    def persistent_load(self, pid: Any) -> StorageStandIn:
        kind, dtype, key, _location, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise pickle.UnpicklingError("a persistent id that is no storage")
        return StorageStandIn(dtype, key)

    def _rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        if self._storages is None or not isinstance(storage, StorageStandIn):
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
def _archive(data: memoryview, what: str) -> tuple[bytes, Callable[[str], memoryview]]:
    """Return the pickle in a ``torch.save`` archive, and a function that finds the bytes of a storage in it. Raises
    ``CheckpointDamaged``."""
    try:
        archive = zipfile.ZipFile(_Mapped(data))
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        order = entries.get("byteorder")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise CheckpointDamaged(f"{what}: a compressed archive")
        if "data.pkl" not in entries or entries["data.pkl"].file_size > _MAX_VALUE_BYTES:
            raise CheckpointDamaged(f"{what}: no pickle of a sensible size in it")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointDamaged(f"{what}: written on a machine of another byte order")
        body = archive.read(entries["data.pkl"])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointDamaged(f"{what}: no archive of torch.save ({error!s:.200})") from error

    def content(key: str) -> memoryview:
        info = entries.get(f"data/{key}")
        if info is None:
            raise CheckpointDamaged(f"{what}: storage {key!r:.40} is missing")
        head = data[info.header_offset : info.header_offset + 30]
        if len(head) < 30 or bytes(head[:4]) != b"PK\3\4":
            raise CheckpointDamaged(f"{what}: storage {key!r:.40} is not where it should be")
        begin = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if begin + info.file_size > len(data):
            raise CheckpointDamaged(f"{what}: storage {key!r:.40} is cut off")
        return data[begin : begin + info.file_size]

    return body, content


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
    body, content = _archive(data, what)
    found = unpickle(body, what, _views(content, what))
    if not isinstance(found, torch.Tensor):
        raise CheckpointDamaged(f"{what}: should be a tensor, and is a {type(found).__name__}")
    return found


def _views(content: Callable[[str], memoryview], what: str) -> Callable[[StorageStandIn, Any], torch.Tensor]:
    def view(storage: StorageStandIn, place: Any) -> torch.Tensor:
        offset, size, stride = place
        whole = all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *size, *stride))
        if len(size) != len(stride) or not whole:
            raise CheckpointDamaged(f"{what}: a malformed tensor")
        data = content(storage.key)
        if 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        if (last + 1) * storage.dtype.itemsize > len(data):
            raise CheckpointDamaged(f"{what}: its data is cut off")
        flat = torch.frombuffer(data[: (last + 1) * storage.dtype.itemsize], dtype=storage.dtype)
        return flat.as_strided(size, stride, offset)

    return view


def value_in(data: memoryview, what: str) -> Any:
    if len(data) > _MAX_VALUE_BYTES:
        raise UnsupportedValue(f"{what}: a value of {len(data)} bytes, over the limit of {_MAX_VALUE_BYTES}")
    body, content = _archive(data, what)
    value = unpickle(body, what, _views(content, what))
    stack, seen = [value], 0
    while stack:
        node = stack.pop()
        seen += 1
        if seen > _MAX_OBJECTS:
            raise UnsupportedValue(f"{what}: over {_MAX_OBJECTS} objects")
        if isinstance(node, Inert | StorageStandIn | torch.Tensor):
            raise UnsupportedValue(f"{what}: holds a {type(node).__name__}")
        if isinstance(node, Mapping):
            stack += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set | frozenset):
            stack += node
    return value
