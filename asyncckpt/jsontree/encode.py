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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import numpy as np

from asyncckpt.errors import UnsupportedValue
from asyncckpt.jsontree import standard_values, torch_values, typed_values, wrapper_tensors
from asyncckpt.jsontree.numpy_values import AS_TENSOR, NUMPY, SAME_SIZE, dtype_of
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

FACTORIES: Final[dict[str, Callable[[], Any] | None]] = {
    "None": None,
    **{t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, Counter, OrderedDict)},
}
_FACTORY_NAMES: Final = {id(factory): name for name, factory in FACTORIES.items()}


#: Returns the name of an object's class and a state of it that can be encoded, or None for any other value.
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
    stored exactly, contains itself, or is nested more than 200 deep. ``objects`` says of which values of other types
    the state is stored with the name of their class; it is asked before they are stored as typed plain data. Does not
    block.
    """
    return Encoder(path, tensor_sink, component, objects).value(value)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value that has been encoded before, which ``encode`` puts into the tree as it is. It holds no tensor."""

    tree: JsonValue


class _Position(int):
    """Stands in a path for a dict key that has no short text, and is the key's position in the dict."""


class Encoder:
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

    def inside(self, owner: Any, name: str, value: Any) -> JsonValue:
        """Return ``value``, the only one that ``owner`` holds, which a path calls ``name``."""
        self.enter(owner)
        self.keys[-1] = name
        out = self.value(value)
        self.leave(owner)
        return out

    def mapping(self, value: dict[Any, Any], owner: Any = None) -> JsonValue:
        """Return a dict; where that was made of another value, ``owner``, its keys can be an object's."""
        if owner is None and not _is_json_object(value):
            return {"$": "dict", "v": self.pairs(value, value)}
        owner = value if owner is None else owner
        self.enter(owner)
        keys, out = self.keys, {}
        for key, item in value.items():
            keys[-1] = key
            out[key] = _ENCODERS.get(type(item), _other)(self, item)
        self.leave(owner)
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

    def base64(self, data: bytes | bytearray | memoryview) -> str:
        return binascii.b2a_base64(data, newline=False).decode("ascii")

    def array(self, value: np.ndarray[Any, Any]) -> JsonValue:
        code = value.dtype.str
        if dtype_of(code) is None:
            self.refuse(value, f"and dtype {value.dtype} cannot be stored exactly")
        shape: list[JsonValue] = list(value.shape)
        if value.nbytes > INLINE_ARRAY_BYTES and code in AS_TENSOR:
            owner = np.require(value, requirements=("C", "W"))
            torch = loaded_torch()
            if torch is None:
                self.refuse(value, f"and {value.nbytes} bytes becomes a tensor", "import torch first")
            return {"$": "ndarray", "dtype": code, "shape": shape, "v": self.tensor(torch.from_numpy(owner))}
        return {"$": "ndarray", "dtype": code, "shape": shape, "v": self.base64(value.tobytes())}


def _is_json_object(value: dict[Any, Any]) -> bool:
    if not value:
        return True
    if set(map(type, value)) != {str} or "$" in value:
        return False
    return all(map(str.isascii, value)) or not any(map(_PAIR.search, value))


def _other(encoder: Encoder, value: Any) -> JsonValue:
    """Encode a value whose type has no row in the table: it is one of torch's, whose rows are added with the first such
    value, a subclass of ``torch.Tensor``, an object, of a type that only the program can name, or it is refused."""
    torch = loaded_torch()
    try:
        if torch.Tensor not in _ENCODERS:
            _ENCODERS.update(torch_values.rows(torch, Encoder.tensor))
        is_tensor = isinstance(value, torch.Tensor)
    except AttributeError:  # torch is not imported, or not completely, so the value cannot be one of its objects
        is_tensor = False
    row = _ENCODERS.get(type(value))
    if row is not None:
        return row(encoder, value)
    if is_tensor:
        if wrapper_tensors.is_wrapper(value):
            return wrapper_tensors.encode(encoder, value)
        return encoder.tensor(value)  # the sink refuses a subclass that cannot be stored
    found = encoder.objects(value) if encoder.objects is not None else None
    if found is not None:
        return {"$": "object", "class": found[0], "v": encoder.items([found[1]])}
    return typed_values.encode(encoder, value)


def _int(_: Encoder, value: int) -> JsonValue:
    return value if value.bit_length() <= _NATIVE_INT_BITS else {"$": "int", "v": f"{value:x}"}


def _float(_: Encoder, value: float) -> JsonValue:
    return value if math.isfinite(value) else {"$": "float", "v": struct.pack(">d", value).hex()}


def _str(_: Encoder, value: str) -> JsonValue:
    if value.isascii() or not _PAIR.search(value):
        return value
    return {"$": "str", "v": value.encode("utf-8", "surrogatepass").hex()}


_ToJson: TypeAlias = Callable[[Encoder, Any], JsonValue]
_ENCODERS: Final[dict[type, _ToJson]] = {
    types.NoneType: lambda _, v: None,
    bool: lambda _, v: bool(v),
    int: _int,
    float: _float,
    str: _str,
    list: lambda e, v: e.items(v),
    dict: Encoder.mapping,
    tuple: lambda e, v: {"$": "tuple", "v": e.items(v)},
    set: Encoder.unordered,
    frozenset: Encoder.unordered,
    OrderedDict: lambda e, v: {"$": "OrderedDict", "v": e.pairs(v, v)},
    Counter: lambda e, v: {"$": "Counter", "v": e.pairs(v, v)},
    defaultdict: Encoder.defaultdict,
    deque: lambda e, v: {"$": "deque", "maxlen": v.maxlen, "v": e.items(v)},
    bytes: lambda e, v: {"$": "bytes", "v": e.base64(v)},
    bytearray: lambda e, v: {"$": "bytearray", "v": e.base64(v)},
    complex: lambda _, v: {"$": "complex", "v": struct.pack(">2d", v.real, v.imag).hex()},
    np.ndarray: Encoder.array,
    **dict.fromkeys(
        (*(dtype.type for dtype in NUMPY.values()), *SAME_SIZE, np.datetime64, np.timedelta64),
        lambda _, v: {"$": "numpy", "dtype": v.dtype.str, "v": v.tobytes().hex()},
    ),
    np.str_: lambda _, v: {"$": "numpy", "dtype": "U", "v": v.encode("utf-8", "surrogatepass").hex()},
    np.bytes_: lambda _, v: {"$": "numpy", "dtype": "S", "v": v.hex()},
    Encoded: lambda _, v: v.tree,
    argparse.Namespace: Encoder.namespace,
    types.SimpleNamespace: Encoder.namespace,
    **standard_values.ENCODERS,
}
