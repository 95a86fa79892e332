"""``encode`` turns Python values into a tree of JSON values, as the package's docstring describes."""

from __future__ import annotations

import argparse
import binascii
import json
import math
import re
import struct
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import numpy as np

from asyncckpt.errors import UnsupportedValue
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    import torch

#: Containers may be nested so deep. Each takes at most two levels of JSON, so the parser's limit is never reached.
MAX_DEPTH: Final = 200
#: An array of more bytes is stored as a tensor.
INLINE_ARRAY_BYTES: Final = 64 << 10
#: So many bits are at most 617 digits, below the lowest limit that ``sys.set_int_max_str_digits`` can set on a reader.
_NATIVE_INT_BITS: Final = 2048
_WAY_OUT: Final = "convert it to plain values, or give the object that holds it state_dict and load_state_dict"
#: JSON's escapes cannot tell these two code points from the one character that they stand for in UTF-16.
_PAIR: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")

# long double is left out: its bytes mean different numbers on different processors
NUMPY: Final = {
    dtype.str: dtype
    for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for dtype in (np.dtype(code).newbyteorder("<"), np.dtype(code).newbyteorder(">"))
}
_SAME_SIZE: Final = (
    np.intc,
    np.uintc,
    np.longlong,
    np.ulonglong,
)  # some platforms have these as types of their own
_INTS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
#: A shard can hold these numpy dtypes, in this machine's byte order; each is mapped to torch's name for it.
AS_TENSOR: Final[dict[str, str]] = {
    np.dtype(name).str: name for name in ("bool", *_INTS, "float16", "float32", "float64", "complex64")
}
FACTORIES: Final[dict[str, Callable[[], Any] | None]] = {
    "None": None,
    **{t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, Counter, OrderedDict)},
}
_FACTORY_NAMES: Final = {id(factory): name for name, factory in FACTORIES.items()}


#: Returns, for a value that no row of the table encodes, its class's name and a state that can be encoded, or None.
Objects: TypeAlias = "Callable[[Any], tuple[str, Any] | None]"


def encode(
    value: Any,
    path: str,
    tensor_sink: Callable[[str, torch.Tensor], None],
    component: str = "",
    objects: Objects | None = None,
) -> JsonValue:
    """Return ``value`` as a tree of JSON values, which copies it. Each tensor is handed, in order and uncopied, to
    ``tensor_sink(name, tensor)``.

    A tensor's name is the path of its keys joined by dots, below the prefix ``path``; a tensor by itself is called
    ``value``. Where two paths give the same name, the later one gets a suffix such as ``~2``. Numpy arrays of more than
    64 KiB are handed over, too, as tensors that share their memory where possible. An object that is reached twice is
    stored twice. Raises ``UnsupportedValue``, which names the path below ``component``, for a value that cannot be
    stored exactly, contains itself, or is nested more than 200 deep. ``objects`` says how values of other types are
    stored; without it they are refused. Does not block.
    """
    return _Encoder(path, tensor_sink, component, objects).value(value)


class _Position(int):
    """Stands in a path for a dict key that has no short text, and is the key's position in the dict."""


class _Encoder:
    """Encodes one value. Each method takes values of one kind, and ``refuse`` raises for the others; ``keys`` is the
    path to the value at hand, and ``unfinished`` has the ``id`` of each container on it."""

    def __init__(
        self, path: str, sink: Callable[[str, torch.Tensor], None], component: str, objects: Objects | None
    ) -> None:
        self.objects = objects
        self.prefix = path
        self.sink = sink
        self.root = "state" + "".join(f"[{part!r}]" for part in dict.fromkeys((component, path)) if part)
        self.keys: list[str | int] = []
        self.unfinished: set[int] = set()
        self.in_sets = 0
        self.names = {"__metadata__"}  # the safetensors header uses this name itself

    def value(self, value: Any) -> JsonValue:
        return _ENCODERS.get(type(value), _other)(self, value)

    def refuse(self, value: Any, why: str = "cannot be stored exactly", way_out: str = _WAY_OUT) -> NoReturn:
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        steps = "".join(f"[<key {int(key)}>]" if type(key) is _Position else f"[{key!r}]" for key in self.keys)
        raise UnsupportedValue(f"{self.root}{steps}: a value of type {name} {why}; {way_out}")

    def enter(self, value: Any) -> None:
        if id(value) in self.unfinished:
            self.refuse(value, "contains itself", "break the cycle")
        if len(self.keys) >= MAX_DEPTH:
            self.refuse(value, f"is nested over {MAX_DEPTH} deep", "flatten it")
        self.unfinished.add(id(value))
        self.keys.append("")

    def leave(self, value: Any) -> None:
        self.unfinished.discard(id(value))
        self.keys.pop()

    def items(self, value: Iterable[Any]) -> list[JsonValue]:
        self.enter(value)
        keys, out = self.keys, []
        for index, item in enumerate(value):
            keys[-1] = index
            out.append(_ENCODERS.get(type(item), _other)(self, item))
        self.leave(value)
        return out

    def mapping(self, value: dict[Any, Any]) -> JsonValue:
        if not _is_json_object(value):
            return {"$": "dict", "v": self.pairs(value, value)}
        self.enter(value)
        keys, out = self.keys, {}
        for key, item in value.items():
            keys[-1] = key
            out[key] = _ENCODERS.get(type(item), _other)(self, item)
        self.leave(value)
        return out

    def pairs(self, owner: Any, value: Mapping[Any, Any]) -> list[JsonValue]:
        """Return the items of ``value``, which belongs to ``owner``, as key, value, key, value, and so on. A list for
        each pair would be nested deeper than ``MAX_DEPTH`` allows for."""
        self.enter(owner)
        keys, out = self.keys, []
        for index, (key, item) in enumerate(value.items()):
            keys[-1] = _Position(index)
            out.append(_ENCODERS.get(type(key), _other)(self, key))
            if type(key) is str or (type(key) is int and key.bit_length() <= _NATIVE_INT_BITS):
                keys[-1] = key
            out.append(_ENCODERS.get(type(item), _other)(self, item))
        self.leave(owner)
        return out

    def tensor(self, value: torch.Tensor) -> JsonValue:
        if self.in_sets:
            self.refuse(value, "in a set has no stable name", "keep it in a list")
        parts = ".".join(map(str, self.keys))
        name = (f"{self.prefix}.{parts}" if self.prefix and self.keys else self.prefix or parts) or "value"
        if not name.isascii():  # readers of safetensors refuse lone surrogates, which are not valid UTF-8
            name = name.encode("utf-8", "backslashreplace").decode()
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}~{count}"
        self.names.add(unique)
        self.sink(unique, value)
        return {"$": "tensor", "v": unique}

    def unordered(self, value: set[Any] | frozenset[Any]) -> JsonValue:
        self.in_sets += 1
        items = sorted(self.items(value), key=json.dumps)  # a set has another order in every process
        self.in_sets -= 1
        return {"$": type(value).__name__, "v": items}

    def defaultdict(self, value: defaultdict[Any, Any]) -> JsonValue:
        factory = _FACTORY_NAMES.get(id(value.default_factory))
        if factory is None:
            self.refuse(value, f"and default_factory {value.default_factory!r:.80} cannot be stored exactly")
        return {"$": "defaultdict", "of": factory, "v": self.pairs(value, value)}

    def namespace(self, value: Any) -> JsonValue:
        if not all(type(key) is str for key in vars(value)):
            self.refuse(value, "with attribute names that are no str cannot be stored")
        return {"$": type(value).__name__, "v": self.pairs(value, vars(value))}

    def object(self, value: Any) -> JsonValue:
        found = self.objects(value) if self.objects is not None else None
        if found is None:
            self.refuse(value)
        name, state = found
        return {"$": "object", "class": name, "v": self.items([state])}

    def array(self, value: np.ndarray[Any, Any]) -> JsonValue:
        code = value.dtype.str
        if code not in NUMPY:
            self.refuse(value, f"and dtype {value.dtype} cannot be stored exactly")
        shape: list[JsonValue] = list(value.shape)
        if value.nbytes > INLINE_ARRAY_BYTES and code in AS_TENSOR:
            owner = np.require(value, requirements=("C", "W"))
            torch = loaded_torch()
            if torch is None:
                self.refuse(value, f"and {value.nbytes} bytes becomes a tensor", "import torch first")
            return {"$": "ndarray", "dtype": code, "shape": shape, "v": self.tensor(torch.from_numpy(owner))}
        return {"$": "ndarray", "dtype": code, "shape": shape, "v": _base64(value.tobytes())}


def _is_json_object(value: dict[Any, Any]) -> bool:
    if not value:
        return True
    if set(map(type, value)) != {str} or "$" in value:
        return False
    return all(map(str.isascii, value)) or not any(map(_PAIR.search, value))


def _base64(data: bytes | bytearray) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _other(encoder: _Encoder, value: Any) -> JsonValue:
    """Encode a value whose type has no row in the table: it is one of torch's, whose rows are added with the first such
    value, a subclass of ``torch.Tensor``, or it is refused."""
    torch = loaded_torch()
    try:
        if torch.Tensor not in _ENCODERS:
            _ENCODERS.update(_rows_of_torch(torch))
        is_tensor = isinstance(value, torch.Tensor)
    except AttributeError:  # torch is not imported, or not completely, so the value cannot be one of its objects
        return encoder.object(value)
    row = _ENCODERS.get(type(value))
    if row is not None:
        return row(encoder, value)
    if not is_tensor:
        return encoder.object(value)
    return encoder.tensor(value)  # the sink refuses a subclass that cannot be stored


def _rows_of_torch(torch: Any) -> dict[type, _ToJson]:
    return {
        torch.Tensor: _Encoder.tensor,
        torch.nn.Parameter: _Encoder.tensor,
        torch.dtype: lambda _, v: {"$": "dtype", "v": str(v).removeprefix("torch.")},
        torch.Size: lambda e, v: {"$": "Size", "v": e.items(v)},
        torch.device: lambda _, v: {"$": "device", "v": [v.type, v.index]},
    }


def _int(_: _Encoder, value: int) -> JsonValue:
    return value if value.bit_length() <= _NATIVE_INT_BITS else {"$": "int", "v": f"{value:x}"}


def _float(_: _Encoder, value: float) -> JsonValue:
    return value if math.isfinite(value) else {"$": "float", "v": struct.pack(">d", value).hex()}


def _str(_: _Encoder, value: str) -> JsonValue:
    if value.isascii() or not _PAIR.search(value):
        return value
    return {"$": "str", "v": value.encode("utf-8", "surrogatepass").hex()}


_ToJson: TypeAlias = Callable[[_Encoder, Any], JsonValue]
_ENCODERS: Final[dict[type, _ToJson]] = {
    types.NoneType: lambda _, v: None,
    bool: lambda _, v: bool(v),
    int: _int,
    float: _float,
    str: _str,
    list: lambda e, v: e.items(v),
    dict: _Encoder.mapping,
    tuple: lambda e, v: {"$": "tuple", "v": e.items(v)},
    set: _Encoder.unordered,
    frozenset: _Encoder.unordered,
    OrderedDict: lambda e, v: {"$": "OrderedDict", "v": e.pairs(v, v)},
    Counter: lambda e, v: {"$": "Counter", "v": e.pairs(v, v)},
    defaultdict: _Encoder.defaultdict,
    deque: lambda e, v: {"$": "deque", "maxlen": v.maxlen, "v": e.items(v)},
    bytes: lambda _, v: {"$": "bytes", "v": _base64(v)},
    bytearray: lambda _, v: {"$": "bytearray", "v": _base64(v)},
    complex: lambda _, v: {"$": "complex", "v": struct.pack(">2d", v.real, v.imag).hex()},
    np.ndarray: _Encoder.array,
    **dict.fromkeys(
        (*(dtype.type for dtype in NUMPY.values()), *_SAME_SIZE),
        lambda _, v: {"$": "numpy", "dtype": v.dtype.str, "v": v.tobytes().hex()},
    ),
    argparse.Namespace: _Encoder.namespace,
    types.SimpleNamespace: _Encoder.namespace,
}
