"""``decode`` turns a tree of JSON values into the Python values that it was encoded from. The tree may be hostile."""

from __future__ import annotations

import argparse
import binascii
import math
import struct
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import numpy as np

from asyncckpt.errors import CheckpointDamaged, InvalidOption
from asyncckpt.jsontree.encode import AS_TENSOR, FACTORIES, MAX_DEPTH, NUMPY
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    import torch


#: Makes, or finds, an object: it is given the path of keys to it, its class's name and its decoded state.
Objects: TypeAlias = "Callable[[tuple[str | int, ...], str, Any], Any]"


def decode(
    tree: JsonValue,
    tensors: Callable[[str], torch.Tensor],
    arrays: Callable[[str], torch.Tensor] | None = None,
    objects: Objects | None = None,
) -> Any:
    """Return the values that ``encode`` was given. ``tensors`` returns the tensor of a name.

    ``arrays`` (``tensors`` by default) returns the tensors that numpy arrays are made of. An array shares the memory of
    its tensor, so that may be filled later; it must be host memory, or ``InvalidOption`` is raised. ``objects`` makes
    the objects that ``encode`` stored by their state; without it that state stands in their place. The tree may be
    hostile: anything that ``encode`` does not produce raises ``CheckpointDamaged``, before memory is allocated for it.
    """
    return _Decoder(tensors, arrays or tensors, objects).value(tree)


class _Decoder:
    """Decodes one tree. Each method builds values of one kind, and refuses with ``fail`` what ``encode`` never makes;
    ``keys`` is the path to the value at hand, for the message."""

    def __init__(
        self,
        tensors: Callable[[str], torch.Tensor],
        arrays: Callable[[str], torch.Tensor],
        objects: Objects | None,
    ) -> None:
        self.objects = objects
        self.tensors = tensors
        self.arrays = arrays
        self.keys: list[str | int] = []

    def value(self, tree: JsonValue) -> Any:
        if type(tree) is dict:
            if "$" not in tree:
                return self.mapping(tree)
            tag = self.tag(tree)
            build = _CONTAINERS.get(tag)
            return build(self, self.items(tree["v"]), tree) if build else _LEAVES[tag](self, tree)
        if type(tree) is list:
            return self.items(tree)
        if tree is not None and type(tree) not in (bool, int, float, str):
            self.fail(f"a {type(tree).__name__} is not JSON")
        return tree

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointDamaged(f"plain values at [{']['.join(map(repr, self.keys))}]: {problem}; the tree is damaged")

    def enter(self) -> None:
        if len(self.keys) >= MAX_DEPTH:
            self.fail(f"nested over {MAX_DEPTH} deep")
        self.keys.append("")

    def tag(self, tree: dict[str, Any]) -> str:
        tag = tree["$"]
        if type(tag) is not str or (tag not in _CONTAINERS and tag not in _LEAVES):
            self.fail(f"the tag {tag!r:.40} is unknown")
        if tree.keys() != _MORE_FIELDS.get(tag, _FIELDS):
            self.fail(f"the fields of {tag!r} are not those it has")
        return tag

    def mapping(self, tree: dict[str, Any]) -> dict[str, Any]:
        self.enter()
        keys, out = self.keys, {}
        for key, item in tree.items():
            keys[-1] = key
            out[key] = self.value(item)
        keys.pop()
        return out

    def items(self, tree: Any) -> list[Any]:
        if type(tree) is not list:
            self.fail("a list was expected")
        self.enter()
        keys, out = self.keys, []
        for index, item in enumerate(tree):
            keys[-1] = index
            out.append(self.value(item))
        keys.pop()
        return out

    def pairs(self, flat: list[Any], into: Any) -> Any:
        """Fill the mapping ``into`` from ``flat``, which lists key, value, key, value, and so on, and return it."""
        if len(flat) % 2:
            self.fail("a key without a value")
        try:
            self.spread(flat[::2])
            for index in range(0, len(flat), 2):
                into[flat[index]] = flat[index + 1]
        except TypeError:
            self.fail("a key that cannot be one")
        if len(into) * 2 != len(flat):
            self.fail("a key appears twice")
        return into

    def spread(self, keys: list[Any]) -> None:
        """Refuse keys that collide. Numbers and tuples have the same hash in every process, and a dict with a hundred
        thousand keys of one hash would take hours to fill."""
        if len(keys) > _MOST_OF_ONE_HASH and max(Counter(map(hash, keys)).values()) > _MOST_OF_ONE_HASH:
            self.fail("keys that were made to collide")

    def unordered(self, items: list[Any], kind: type[set[Any] | frozenset[Any]]) -> Any:
        try:
            self.spread(items)
            found = kind(items)
        except TypeError:
            self.fail("a set with an element that cannot be one")
        if len(found) != len(items):
            self.fail("a set with an element twice")
        return found

    def defaultdict(self, flat: list[Any], tree: dict[str, Any]) -> Any:
        if type(tree["of"]) is not str or tree["of"] not in FACTORIES:
            self.fail(f"the default_factory {tree['of']!r:.40} is unknown")
        return self.pairs(flat, defaultdict(FACTORIES[tree["of"]]))

    def object(self, items: list[Any], tree: dict[str, Any]) -> Any:
        if type(tree["class"]) is not str or len(items) != 1:
            self.fail("an object without a class and a state")
        return items[0] if self.objects is None else self.objects(tuple(self.keys), tree["class"], items[0])

    def deque(self, items: list[Any], tree: dict[str, Any]) -> Any:
        maxlen = tree["maxlen"]
        if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen < 1 << 63):
            self.fail("a deque with an impossible maxlen")
        return deque(items, maxlen)

    def namespace(self, flat: list[Any], into: Any) -> Any:
        attributes = self.pairs(flat, {})
        if not all(type(key) is str for key in attributes):
            self.fail("an attribute name that is no str")
        vars(into).update(attributes)
        return into

    def hex(self, text: Any, nbytes: int | None = None) -> bytes:
        try:
            data = bytes.fromhex(text)
        except (TypeError, ValueError):
            self.fail("hex digits were expected")
        if len(text) != 2 * len(data) or nbytes not in (None, len(data)):
            self.fail("hex digits of the wrong length")
        return data

    def base64(self, text: Any, nbytes: int | None = None) -> bytes:
        if type(text) is not str or (nbytes is not None and len(text) != -(-nbytes // 3) * 4):
            self.fail("base64 of the wrong length")
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except ValueError as error:
            self.fail(f"invalid base64 ({error})")
        if nbytes not in (None, len(data)):
            self.fail("base64 of the wrong length")
        return data

    def integer(self, text: Any) -> int:
        try:
            return int(text, 16)
        except (TypeError, ValueError):
            self.fail("hex digits were expected")

    def text(self, digits: Any) -> str:
        try:
            return self.hex(digits).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self.fail("a str that is no UTF-8")

    def numpy_dtype(self, code: Any) -> np.dtype[Any]:
        if type(code) is not str or code not in NUMPY:
            self.fail(f"the numpy dtype {code!r:.40} is unknown")
        return NUMPY[code]

    def numbers(self, data: bytes, dtype: np.dtype[Any], shape: list[int]) -> np.ndarray[Any, Any]:
        if dtype.kind == "b" and data.translate(None, b"\0\1"):
            self.fail("a bool that is neither 0 nor 1")
        try:
            return np.ndarray(shape, dtype, buffer=data).copy()
        except ValueError as error:  # numpy refuses so many dimensions, or so large ones beside a 0
            self.fail(f"an impossible shape ({error})")

    def scalar(self, tree: dict[str, Any]) -> Any:
        dtype = self.numpy_dtype(tree["dtype"])
        return self.numbers(self.hex(tree["v"], dtype.itemsize), dtype, [1])[0]

    def array(self, tree: dict[str, Any]) -> np.ndarray[Any, Any]:
        dtype, shape, content = self.numpy_dtype(tree["dtype"]), tree["shape"], tree["v"]
        if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            self.fail("a shape that is not a list of sizes")
        if type(content) is not dict:
            return self.numbers(self.base64(content, math.prod(shape) * dtype.itemsize), dtype, shape)
        name = content.get("v")
        if content.keys() != _FIELDS or content["$"] != "tensor" or type(name) is not str:
            self.fail("an array that is neither base64 nor a tensor")
        tensor = self.arrays(name)
        if list(tensor.shape) != shape or str(tensor.dtype) != f"torch.{AS_TENSOR.get(dtype.str)}":
            self.fail(f"an array whose tensor {name!r:.80} has another shape or dtype")
        if tensor.device.type != "cpu":
            raise InvalidOption(f"{name!r} is a numpy array and was given a tensor on {tensor.device}; give one on cpu")
        return tensor.detach().numpy()

    def tensor(self, name: Any) -> torch.Tensor:
        if type(name) is not str:
            self.fail("a tensor's name that is no str")
        return self.tensors(name)

    def float(self, digits: Any) -> float:
        number: float = struct.unpack(">d", self.hex(digits, 8))[0]
        return number

    def torch_dtype(self, name: Any) -> torch.dtype:
        there = _torch()
        # vars, not getattr, which would make torch import a module that the tree names
        found: Any = vars(there).get(name) if type(name) is str else None
        if type(found) is not there.dtype or str(found) != f"torch.{name}":  # aliases such as half are never written
            self.fail(f"the torch dtype {name!r:.40} is unknown")
        dtype: torch.dtype = found
        return dtype

    def size(self, sizes: list[Any]) -> torch.Size:
        if not all(type(size) is int and -1 << 63 <= size < 1 << 63 for size in sizes):
            self.fail("a torch.Size of something else than sizes")
        size: torch.Size = _torch().Size(sizes)
        return size

    def device(self, tree: Any) -> torch.device:
        kind, index = tree if type(tree) is list and len(tree) == 2 else (None, None)
        # torch keeps the index in 8 bits and wraps larger ones silently
        if type(kind) is not str or not (index is None or (type(index) is int and 0 <= index < 128)):
            self.fail("a device that is no name and index")
        make = _torch().device
        try:
            device: torch.device = make(kind) if index is None else make(kind, index)
        except RuntimeError:
            self.fail(f"the device {kind!r:.40} is unknown")
        return device


def _torch() -> Any:
    torch = loaded_torch()
    if torch is None:
        raise InvalidOption("the plain values hold a dtype, size or device of torch: import torch, then decode them")
    return torch


_MOST_OF_ONE_HASH: Final = 1000
_FIELDS: Final = frozenset({"$", "v"})
_MORE_FIELDS: Final = {
    "defaultdict": _FIELDS | {"of"},
    "deque": _FIELDS | {"maxlen"},
    "object": _FIELDS | {"class"},
    "numpy": _FIELDS | {"dtype"},
    "ndarray": _FIELDS | {"dtype", "shape"},
}
_Leaf: TypeAlias = Callable[[_Decoder, dict[str, Any]], Any]
_LEAVES: Final[dict[str, _Leaf]] = {
    "tensor": lambda d, t: d.tensor(t["v"]),
    "int": lambda d, t: d.integer(t["v"]),
    "float": lambda d, t: d.float(t["v"]),
    "complex": lambda d, t: complex(*struct.unpack(">2d", d.hex(t["v"], 16))),
    "str": lambda d, t: d.text(t["v"]),
    "bytes": lambda d, t: d.base64(t["v"]),
    "bytearray": lambda d, t: bytearray(d.base64(t["v"])),
    "numpy": _Decoder.scalar,
    "ndarray": _Decoder.array,
    "dtype": lambda d, t: d.torch_dtype(t["v"]),
    "device": lambda d, t: d.device(t["v"]),
}
#: These builders are given decoded members, and do not recurse: with two frames a level the caller's stack lasts.
_Container: TypeAlias = Callable[[_Decoder, list[Any], dict[str, Any]], Any]
_CONTAINERS: Final[dict[str, _Container]] = {
    "tuple": lambda d, items, t: tuple(items),
    "set": lambda d, items, t: d.unordered(items, set),
    "frozenset": lambda d, items, t: d.unordered(items, frozenset),
    "dict": lambda d, flat, t: d.pairs(flat, {}),
    "OrderedDict": lambda d, flat, t: d.pairs(flat, OrderedDict()),
    "Counter": lambda d, flat, t: d.pairs(flat, Counter()),
    "defaultdict": _Decoder.defaultdict,
    "deque": _Decoder.deque,
    "Size": lambda d, sizes, t: d.size(sizes),
    "Namespace": lambda d, flat, t: d.namespace(flat, argparse.Namespace()),
    "object": _Decoder.object,
    "SimpleNamespace": lambda d, flat, t: d.namespace(flat, types.SimpleNamespace()),
}
