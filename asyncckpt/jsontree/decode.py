"""``decode`` turns a tree of JSON values into the Python values that it was encoded from. The tree may be hostile."""

from __future__ import annotations

import argparse
import binascii
import struct
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from asyncckpt.errors import CheckpointDamaged, UnsupportedValue
from asyncckpt.jsontree import numpy_values, standard_values, torch_values, typed_values, wrapper_tensors
from asyncckpt.jsontree.encode import FACTORIES, MAX_DEPTH, encode
from asyncckpt.jsontree.typed_values import Live, needs_live
from asyncckpt.jsontree.wrapper_tensors import Wrappers
from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    import torch

#: Makes, or finds, an object. It is given what lives at its place (or None), its class's name and its decoded state.
Objects: TypeAlias = "Callable[[Any, str, Any], Any]"
#: Returns the tensor of a name, given what lives at its place (or None).
Places: TypeAlias = "Callable[[str, Any], torch.Tensor]"


def decode(
    tree: JsonValue,
    tensors: Callable[[str], torch.Tensor],
    arrays: Callable[[str], torch.Tensor] | None = None,
    live: Live | None = None,
    objects: Objects | None = None,
    wrappers: Wrappers | None = None,
    places: Places | None = None,
) -> Any:
    """Return the values that ``encode`` was given. ``tensors`` returns the tensor of a name.

    ``arrays`` (``tensors`` by default) returns the tensors that numpy arrays are made of. An array shares the memory of
    its tensor, so that may be filled later; it must be host memory, or ``InvalidOption`` is raised. The tree may be
    hostile: anything that ``encode`` does not produce raises ``CheckpointDamaged``, before memory is allocated for it.
    Values whose types only a program can name get those of ``live``; without it they are plain data.
    ``objects`` makes the objects that ``encode`` stored by their state; without it that state stands in their place.
    ``wrappers`` makes tensors of subclasses that wrap others; without it a dict stands in their place, of their class's
    name, the tensors inside, the context, the shape and the dtype. ``places``, if given, returns tensors in the place
    of ``tensors``, and is told what lives there.
    """
    decoder = Decoder(tensors, arrays or tensors, live or Live(None), objects, wrappers, places)
    return decoder.value(tree, decoder.live.value)


class Decoder:
    """Decodes one tree. Each method builds values of one kind, and refuses with ``fail`` what ``encode`` never makes;
    ``keys`` is the path to the value at hand, for the message. A parameter ``live`` is the live value at that path, or
    None where there is none."""

    def __init__(
        self,
        tensors: Callable[[str], torch.Tensor],
        arrays: Callable[[str], torch.Tensor],
        live: Live,
        objects: Objects | None,
        wrappers: Wrappers | None,
        places: Places | None,
    ) -> None:
        self.objects = objects
        self.wrappers = wrappers
        self.places = places
        self.tensors = tensors
        self.arrays = arrays
        self.live = live
        self.keys: list[str | int] = []

    def value(self, tree: JsonValue, live: Any = None) -> Any:
        if type(tree) is dict:
            if "$" not in tree:
                return self.mapping(tree, live)
            tag = self.tag(tree)
            build = _CONTAINERS.get(tag)
            if build:
                members = self.flat if tag in _MAPPINGS else self.members if tag in _SETS else self.items
                return build(self, members(tree["v"], live), tree)
            if tag == "object":
                return self.object(self.items(tree["v"], typed_values.state_of_object(live)), tree, live)
            if tag == wrapper_tensors.TAG:
                return wrapper_tensors.decode(self, tree, live)
            if tag == "tensor":
                return self.tensor(tree["v"], live)
            if tag in typed_values.WITH_FIELDS:
                lives = typed_values.lives_of_fields(self, tree, live)
                return (
                    live if lives is None else typed_values.of_fields(self, tree, self.mapping(tree["v"], lives), live)
                )
            found = typed_values.DECODERS.get(tag)
            return found(self, tree, live) if found else _LEAVES[tag](self, tree)
        if type(tree) is list:
            return self.items(tree, live)
        if tree is not None and type(tree) not in (bool, int, float, str):
            self.fail(f"a {type(tree).__name__} is not JSON")
        return tree

    def where(self) -> str:
        return f"[{']['.join(map(repr, self.keys))}]" if self.keys else ""

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointDamaged(f"plain values at {self.where() or '[]'}: {problem}; the tree is damaged")

    def note(self, why: str) -> None:
        """Note that the type of the live value at hand does not take what was stored."""
        self.live.mismatched.append(f"{self.where()}: {why}")

    def note_plain(self) -> None:
        """Note that the value at hand is plain data, because nothing of its kind lives at its place."""
        self.live.untyped.append(self.where())

    def encoded(self, value: Any) -> JsonValue:
        """Encode a live value that holds no tensor. Raises ``UnsupportedValue``."""
        return encode(value, "", _no_tensor)

    def within(self, name: str, tree: JsonValue) -> Any:
        """Return the only value that the one at hand holds, which a path calls ``name``."""
        self.enter()
        self.keys[-1] = name
        found = self.value(tree)
        self.keys.pop()
        return found

    def enter(self) -> None:
        if len(self.keys) >= MAX_DEPTH:
            self.fail(f"nested over {MAX_DEPTH} deep")
        self.keys.append("")

    def tag(self, tree: dict[str, Any]) -> str:
        tag = tree["$"]
        if type(tag) is not str or tag not in _TAGS:
            self.fail(f"the tag {tag!r:.40} is unknown")
        if tree.keys() != _MORE_FIELDS.get(tag, _FIELDS):
            self.fail(f"the fields of {tag!r} are not those it has")
        return tag

    def mapping(self, tree: Any, live: Any = None) -> dict[str, Any]:
        self.enter()
        lives = _items_of(live)
        keys, out = self.keys, {}
        for key, item in tree.items():
            keys[-1] = key
            out[key] = self.value(item, lives.get(key))
        keys.pop()
        return out

    def items(self, tree: Any, live: Any = None) -> list[Any]:
        if type(tree) is not list:
            self.fail("a list was expected")
        self.enter()
        lives = live if isinstance(live, list | tuple | deque) else ()
        keys, out = self.keys, []
        for index, item in enumerate(tree):
            keys[-1] = index
            out.append(self.value(item, lives[index] if index < len(lives) else None))
        keys.pop()
        return out

    def flat(self, tree: Any, live: Any) -> list[Any]:
        """Return a mapping's keys and values, which alternate in ``tree``."""
        lives = _items_of(live)
        if not lives or type(tree) is not list:
            return self.items(tree)
        self.enter()
        keys, out = self.keys, []
        for index, item in enumerate(tree):
            keys[-1] = index
            if index % 2 == 0:
                out.append(self.member(item, lives))
                continue
            try:
                out.append(self.value(item, lives.get(out[-1])))
            except TypeError:
                self.fail("a key that cannot be one")
        keys.pop()
        return out

    def members(self, tree: Any, live: Any) -> list[Any]:
        """Return the members of a set."""
        if not isinstance(live, set | frozenset) or type(tree) is not list:
            return self.items(tree)
        self.enter()
        keys, out = self.keys, []
        for index, item in enumerate(tree):
            keys[-1] = index
            out.append(self.member(item, live))
        keys.pop()
        return out

    def member(self, tree: JsonValue, lives: Iterable[Any]) -> Any:
        """Return a key, or a member of a set. Its place tells nothing of its live type: any of those that live beside
        it may be the one, the first that takes it is."""
        if type(tree) is dict and tree.get("$") == "object":
            return self.value(tree, next((one for one in lives if _is_of(one, tree.get("class"))), None))
        if not needs_live(tree):
            return self.value(tree)
        notes = self.live
        try:
            for candidate in {type(one): one for one in lives}.values():
                self.live = Live(candidate)
                found = self.value(tree, candidate)
                if not self.live.untyped and not self.live.mismatched:
                    return found
        finally:
            self.live = notes
        return self.value(tree)

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

    def object(self, items: list[Any], tree: dict[str, Any], live: Any) -> Any:
        if type(tree["class"]) is not str or len(items) != 1:
            self.fail("an object without a class and a state")
        if self.objects is None:
            self.note_plain()
            return items[0]
        return self.objects(live, tree["class"], items[0])

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

    def tensor(self, name: Any, live: Any = None) -> torch.Tensor:
        if type(name) is not str:
            self.fail("a tensor's name that is no str")
        return self.tensors(name) if self.places is None else self.places(name, live)

    def float(self, digits: Any) -> float:
        number: float = struct.unpack(">d", self.hex(digits, 8))[0]
        return number


def _no_tensor(name: str, _tensor: object) -> None:
    raise UnsupportedValue(f"{name} is a tensor")


def _items_of(live: Any) -> Mapping[Any, Any]:
    """Return what a live mapping, or a namespace, holds."""
    if isinstance(live, dict):
        return live
    return vars(live) if type(live) in (argparse.Namespace, types.SimpleNamespace) else {}


def _is_of(value: Any, class_name: Any) -> bool:
    """Whether a live value's class has the last part of this name, which its module may have moved away from."""
    return type(class_name) is str and type(value).__name__ == class_name.rpartition(".")[2]


_MOST_OF_ONE_HASH: Final = 1000
_FIELDS: Final = frozenset({"$", "v"})
_FIELDS_OF_TAGS: Final = standard_values.FIELDS | typed_values.FIELDS | wrapper_tensors.FIELDS
_MORE_FIELDS: Final = {
    "defaultdict": _FIELDS | {"of"},
    "deque": _FIELDS | {"maxlen"},
    "object": _FIELDS | {"class"},
    "numpy": _FIELDS | {"dtype"},
    "ndarray": _FIELDS | {"dtype", "shape"},
    **{tag: _FIELDS | more for tag, more in _FIELDS_OF_TAGS.items()},
}
_MAPPINGS: Final = frozenset({"dict", "OrderedDict", "Counter", "defaultdict", "Namespace", "SimpleNamespace"})
_SETS: Final = frozenset({"set", "frozenset"})
_Leaf: TypeAlias = Callable[[Decoder, dict[str, Any]], Any]
_LEAVES: Final[dict[str, _Leaf]] = {
    "tensor": lambda d, t: d.tensor(t["v"]),
    "int": lambda d, t: d.integer(t["v"]),
    "float": lambda d, t: d.float(t["v"]),
    "complex": lambda d, t: complex(*struct.unpack(">2d", d.hex(t["v"], 16))),
    "str": lambda d, t: d.text(t["v"]),
    "bytes": lambda d, t: d.base64(t["v"]),
    "bytearray": lambda d, t: bytearray(d.base64(t["v"])),
    "numpy": numpy_values.to_scalar,
    "ndarray": numpy_values.to_array,
    "dtype": lambda d, t: torch_values.to_dtype(d, t["v"]),
    "device": lambda d, t: torch_values.to_device(d, t["v"]),
    **standard_values.DECODERS,
}
#: These builders are given decoded members, and do not recurse: with two frames a level the caller's stack lasts.
_Container: TypeAlias = Callable[[Decoder, list[Any], dict[str, Any]], Any]
_CONTAINERS: Final[dict[str, _Container]] = {
    "tuple": lambda d, items, t: tuple(items),
    "set": lambda d, items, t: d.unordered(items, set),
    "frozenset": lambda d, items, t: d.unordered(items, frozenset),
    "dict": lambda d, flat, t: d.pairs(flat, {}),
    "OrderedDict": lambda d, flat, t: d.pairs(flat, OrderedDict()),
    "Counter": lambda d, flat, t: d.pairs(flat, Counter()),
    "defaultdict": Decoder.defaultdict,
    "deque": Decoder.deque,
    "Size": lambda d, sizes, t: torch_values.to_size(d, sizes),
    "Namespace": lambda d, flat, t: d.namespace(flat, argparse.Namespace()),
    "SimpleNamespace": lambda d, flat, t: d.namespace(flat, types.SimpleNamespace()),
}
_TAGS: Final = frozenset({*_LEAVES, *_CONTAINERS, *typed_values.TAGS, "object", wrapper_tensors.TAG})
