"""The pickle in a file of ``torch.save`` is read here without executing it.

The unpickler knows torch's storages and the functions that make tensors of them, plain containers and values, and
NumPy's arrays. Any other name becomes a stand-in, which only remembers that it was there: nothing is looked up or
called that a forger could choose.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np
import torch

from asyncckpt.convert.torch_archive import is_place
from asyncckpt.errors import CheckpointDamaged

#: The limit holds for the objects in one file: through references a few bytes can make more than any memory holds.
MAX_OBJECTS: Final = 5_000_000
#: The storages that pickles of torch name.
STORAGES: Final = {
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
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
#: What may be made of it stays within the size of the pickle.
_VALUES: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,
    ("collections", "deque"): collections.deque,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("datetime", "datetime"): datetime.datetime,
    ("datetime", "date"): datetime.date,
    ("datetime", "timedelta"): datetime.timedelta,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "PurePosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
_FACTORIES: Final = {name: kind for kind in (list, dict, set, int, float, str, tuple, bool) for name in [kind.__name__]}
_NUMPY_MODULES: Final = ("numpy.core.multiarray", "numpy._core.multiarray")


@dataclass(frozen=True)
class Storage:
    """A storage that the pickle refers to: ``key`` finds its bytes, ``dtype`` is that of its elements."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class TensorStandIn:
    """Stands for a tensor: elements of a storage, with ``offset``, ``size`` and ``stride`` in elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Lost:
    """Stands for an object that no plain value can hold. ``why`` says what it was."""

    why = "an object"

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _item: Any) -> None:
        pass

    def extend(self, _items: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> Self:
        return self


def _lost(why: str) -> Lost:
    found = Lost()
    found.why = why
    return found


class _NumpyArray:
    """Becomes an array once its state is known."""

    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array of an odd form")
        flat = np.frombuffer(data, dtype.dtype()).copy()
        self.array = flat.reshape(shape, order="F" if fortran else "C")


class _NumpyDtype:
    """Stands for a dtype of NumPy; only plain numbers are taken."""

    def __init__(self, code: Any, *_: Any) -> None:
        self._code = code
        self._order = "|"

    def __setstate__(self, state: Any) -> None:
        if len(state) > 4 and (state[2] is not None or state[3] is not None or state[4] is not None):
            raise pickle.UnpicklingError("an array of records")
        self._order = state[1]

    def dtype(self) -> np.dtype[Any]:
        if not isinstance(self._code, str) or self._code[:1] not in "biufc" or not self._code[1:].isdecimal():
            raise pickle.UnpicklingError(f"an array of dtype {self._code!r:.40}")
        order: Any = self._order if self._order in ("<", ">") else "="
        return np.dtype(self._code).newbyteorder(order)


def _numpy_reconstruct(*_: Any) -> _NumpyArray:
    return _NumpyArray()


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a number of an odd form")
    return np.frombuffer(data, dtype.dtype(), 1)[0]


def latin1(text: Any, encoding: Any) -> bytes:
    """Make bytes of the text that pickles of protocol 2 hold them as."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an odd encoding")
    return text.encode("latin1")


def _size(sizes: Any = ()) -> torch.Size:
    return torch.Size(sizes)


class _Factory(Lost):
    """Stands for a type that a pickle may name without calling it: that of a ``defaultdict``'s values."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.why = f"the type {kind.__name__}"


def _defaultdict(factory: Any = None, *items: Any) -> Any:
    kind = factory.kind if isinstance(factory, _Factory) else None
    if factory is not None and kind is None:
        return _lost("collections.defaultdict with a function")
    return collections.defaultdict(kind, *items)


_Python: Any = pickle._Unpickler


class PatientUnpickler(_Python):  # type: ignore[misc]
    """The unpickler of the standard library that is written in Python, without what a forger could use.

    The one in C makes a table as long as the largest number in the pickle, which takes all memory; buffers of a length
    that is only claimed, extensions that a program registered, and attributes for classes and functions are refused by
    both kinds of pickle that are read here."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: call
        for code, call in _Python.dispatch.items()
        if bytes([code])
        not in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    }
    #: Objects of these may be given attributes.
    built: tuple[type, ...] = ()

    def load_build(self) -> None:
        """Give an object its state, where it is one of those that may have some."""
        if not isinstance(self.stack[-2], self.built):
            raise pickle.UnpicklingError(f"attributes for a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class _Unpickler(PatientUnpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._kinds: dict[tuple[str, str], type[Lost]] = {}

    built = (
        Lost,
        _NumpyArray,
        _NumpyDtype,
        collections.OrderedDict,
        argparse.Namespace,
        types.SimpleNamespace,
    )

    def find_class(self, module: str, name: str) -> Any:
        found = _VALUES.get((module, name)) or _FUNCTIONS.get((module, name))
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None) if name.isidentifier() else None, torch.dtype):
            return getattr(torch, name)
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module in ("builtins", "__builtin__") and name in _FACTORIES:
            return _Factory(_FACTORIES[name])
        if module == "numpy" and name == "dtype":
            return _NumpyDtype
        if module == "numpy" and name == "ndarray":
            return Lost
        if module in _NUMPY_MODULES and name in ("_reconstruct", "scalar"):
            return _numpy_reconstruct if name == "_reconstruct" else _numpy_scalar
        kind = self._kinds.get((module, name))
        if kind is None:
            kind = self._kinds[module, name] = type("Lost", (Lost,), {"why": f"{module}.{name}"[:120]})
        return kind

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 4 or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id that is no storage")
        if not isinstance(pid[1], torch.dtype) or not isinstance(pid[2], str):
            return _lost(f"a storage of {getattr(pid[1], 'why', 'an odd type')}")
        if len(pid) > 5 and pid[5] is not None:
            return _lost("a storage that is a part of another (a file of torch before 0.4)")
        return Storage(pid[1], pid[2])


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Stands in for ``torch._utils._rebuild_tensor_v2`` and for the older function, which lacks ``rest``."""
    metadata = rest[2] if len(rest) > 2 else None
    return _tensor(storage, storage.dtype if isinstance(storage, Storage) else None, offset, size, stride, metadata)


def _rebuild_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    """Stands in for ``torch._utils._rebuild_tensor_v3``."""
    return _tensor(storage, dtype, offset, size, stride, metadata)


def _tensor(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any) -> Any:
    if isinstance(storage, Lost):
        return _lost(f"a tensor of {storage.why}")
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor of no storage")
    if metadata:
        return _lost("a tensor that is conjugated or negated lazily")
    if not is_place(offset, size, stride):
        raise pickle.UnpicklingError("a malformed tensor")
    return TensorStandIn(storage, dtype, offset, tuple(size), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _of_type(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """Stands in for ``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, or of a subclass."""
    if isinstance(kind, Lost) or (isinstance(kind, type) and issubclass(kind, Lost)):
        return _lost(f"a tensor of the class {kind.why}")
    return function(*args) if function in _REBUILDING else _lost("a tensor of an odd kind")


def _parameter_class(data: Any = None, *_: Any) -> Any:
    return data


def _zero_stage(number: Any = None, *_: Any) -> int:
    """Stands in for DeepSpeed's enumeration of ZeRO's stages."""
    if type(number) is not int:
        raise pickle.UnpicklingError("a stage of ZeRO that is no number")
    return number


_FUNCTIONS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch.nn.parameter", "Parameter"): _parameter_class,
    ("torch", "Tensor"): _parameter_class,
    ("torch", "Size"): _size,
    ("_codecs", "encode"): latin1,
    ("collections", "defaultdict"): _defaultdict,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _zero_stage,
}
_REBUILDING: Final = (_rebuild, _rebuild_of_dtype, _parameter)


def unpickle(file: Any, what: str) -> Any:
    """Return what the pickle in ``file`` describes, made of plain values, ``TensorStandIn`` and ``Lost``. The file
    stands after the pickle then. Raises ``CheckpointDamaged``."""
    try:
        return _Unpickler(file).load()
    except CheckpointDamaged:
        raise
    except Exception as error:  # a forger's opcodes can run into anything
        raise CheckpointDamaged(
            f"{what}: its pickle cannot be read ({type(error).__name__}: {error!s:.200})"
        ) from error


def unpickle_bytes(data: bytes, what: str) -> Any:
    """Return what the pickle describes; see ``unpickle``."""
    return unpickle(io.BytesIO(data), what)


#: What ``resolve`` makes of a stand-in for a tensor; a text says why that is impossible.
Tensors = Callable[[TensorStandIn], Any]


def resolve(value: Any, tensors: Tensors, lost: dict[str, str], what: str) -> Any:
    """Return ``value`` with its stand-ins replaced; what cannot be is left out, and ``lost`` says it by its path.
    Raises ``CheckpointDamaged`` for too many objects and too deep nesting."""
    return _Resolving(tensors, lost, what).value(value, ())


class _Resolving:
    def __init__(self, tensors: Tensors, lost: dict[str, str], what: str) -> None:
        self._tensors = tensors
        self._lost = lost
        self._what = what
        self._count = 0

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        self._count += 1
        if self._count > MAX_OBJECTS or len(path) > 200:
            raise CheckpointDamaged(f"{self._what}: over {MAX_OBJECTS} objects, or nested over 200 deep")
        if isinstance(value, TensorStandIn):
            found = self._tensors(value)
            return self._drop(path, found) if isinstance(found, str) else found
        if isinstance(value, Lost) or (isinstance(value, type) and issubclass(value, Lost)):
            return self._drop(path, value.why)
        if isinstance(value, _NumpyArray):
            return value.array if value.array is not None else self._drop(path, "an empty array")
        if isinstance(value, Storage):
            return self._drop(path, "a storage without a tensor")
        if isinstance(value, Mapping):
            items = [(key, self.value(item, (*path, str(key)))) for key, item in value.items()]
            made = {key: item for key, item in items if item is not _GONE}
            if isinstance(value, collections.defaultdict):
                return collections.defaultdict(value.default_factory, made)
            kind: Any = type(value)
            return made if kind is dict else kind(made)
        if isinstance(value, argparse.Namespace | types.SimpleNamespace):
            members = self.value(dict(vars(value)), path)
            return type(value)(**members)
        if type(value) in (list, tuple, collections.deque):
            found = [self.value(item, (*path, str(number))) for number, item in enumerate(value)]
            return type(value)(None if item is _GONE else item for item in found)
        if isinstance(value, set | frozenset):
            return type(value)(item for item in (self.value(i, (*path, "")) for i in value) if item is not _GONE)
        return value

    def _drop(self, path: tuple[str, ...], why: str) -> Any:
        self._lost[".".join(path) or "value"] = why
        return _GONE


class _Gone:
    pass


_GONE: Final = _Gone()
