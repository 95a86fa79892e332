"""Tensors of subclasses that wrap others, such as quantised weights, are stored as the tensors inside and a context of
plain values: what ``__tensor_flatten__`` gives.

The name of their class is stored to be compared, and never looked up. The live tensor at their place says what they
become; without one they are a dict.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from asyncckpt.errors import UnsupportedValue
from asyncckpt.jsontree import torch_values
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    from asyncckpt.jsontree.decode import Decoder
    from asyncckpt.jsontree.encode import Encoder

TAG: Final = "wrapper"
#: The fields that the tag has beside ``$`` and ``v``.
FIELDS: Final = {TAG: frozenset({"class", "context", "size", "dtype"})}
#: Longer names of classes are left out.
_LONGEST_NAME: Final = 1000
_WAY_OUT: Final = (
    "store a plain tensor, or the plain tensors inside: give the object that holds it state_dict and load_state_dict"
)


@dataclass(frozen=True, slots=True)
class Wrapper:
    """``Wrapper`` is a stored tensor of a wrapping subclass. ``inside``: for each tensor inside, by its attribute, the
    name that it is stored under, or another wrapper. ``context``: encoded. ``size`` and ``dtype``: those that the
    tensor shows to the outside; the dtype without ``torch.``."""

    class_name: str
    inside: dict[str, str | Wrapper]
    context: JsonValue
    size: tuple[int, ...]
    dtype: str

    def leaves(self, path: str = "") -> Iterator[tuple[str, str]]:
        """Yield, for each plain tensor inside, the attributes that lead to it, joined by dots, and its stored name."""
        for attribute, part in self.inside.items():
            where = f"{path}.{attribute}" if path else attribute
            if isinstance(part, Wrapper):
                yield from part.leaves(where)
            else:
                yield where, part

    def difference(self, live: Wrapper) -> str | None:
        """Say in what a live tensor differs from this one, but for the tensors inside; None where in nothing. Classes
        are compared by their last names, because a class may move to another module."""
        if _bare(self.class_name) != _bare(live.class_name):
            return f"saved as a {_bare(self.class_name):.200}, live a {_bare(live.class_name)}"
        name = _bare(live.class_name)
        sides: tuple[tuple[str, object, object], ...] = (
            ("the tensors", sorted(self.inside), sorted(live.inside)),
            ("shape", list(self.size), list(live.size)),
            ("dtype", self.dtype, live.dtype),
            ("context", self.context, live.context),
        )
        for what, saved, here in sides:
            if saved != here:
                return f"saved as a {name} of {what} {saved!r:.400}, live {here!r:.400}"
        for attribute, part in self.inside.items():
            other = live.inside[attribute]
            if isinstance(part, Wrapper) != isinstance(other, Wrapper):
                return f"{attribute} is a plain tensor in one of the two, saved and live, and wraps others in the other"
            if isinstance(part, Wrapper) and isinstance(other, Wrapper):
                inner = part.difference(other)
                if inner is not None:
                    return f"{attribute} inside: {inner}"
        return None


#: Finds or makes the tensor that a stored one becomes, or returns ``NotImplemented`` for plain data. It is given what
#: lives there, and the path of the place.
Wrappers: TypeAlias = "Callable[[Wrapper, Any, str], Any]"


def is_wrapper(value: Any) -> bool:
    """Return whether ``value`` is a tensor of a subclass that says which tensors it wraps. A ``DTensor`` says so, too,
    and is stored otherwise; what stands for a collective that is under way has no values yet."""
    kind = type(value)
    if not hasattr(kind, "__tensor_flatten__") or not hasattr(kind, "__tensor_unflatten__"):
        return False
    torch = loaded_torch()
    if torch is None or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        return False
    return not kind.__module__.startswith("torch.distributed.")


def parts_of(value: Any) -> list[Any]:
    """Return the plain tensors inside a wrapper, at any depth."""
    found: list[Any] = []
    for name in value.__tensor_flatten__()[0]:
        part = getattr(value, name)
        found += parts_of(part) if is_wrapper(part) else [part]
    return found


def encode(encoder: Encoder, value: Any) -> JsonValue:
    """Encode a wrapper. Raises ``UnsupportedValue`` where it does not give its parts or its context is not plain."""
    if encoder.in_sets:
        encoder.refuse(value, "in a set has no stable name", "keep it in a list")
    try:
        names, context = value.__tensor_flatten__()
        parts = {str(name): getattr(value, name) for name in names}
    except Exception as error:  # whatever the class raises
        encoder.refuse(value, f"does not give its parts ({type(error).__name__}: {error})", _WAY_OUT)
    torch: Any = loaded_torch()
    encoder.enter(value)
    inside: dict[str, JsonValue] = {}
    for name, part in parts.items():
        encoder.keys[-1] = name
        if not isinstance(part, torch.Tensor):
            encoder.refuse(part, f"stands where {type(value).__name__} says that it has a tensor", _WAY_OUT)
        inside[name] = encoder.value(part)
    encoder.keys[-1] = "context"
    plain = _context(encoder, context)
    encoder.leave(value)
    return {
        "$": TAG,
        "class": class_name(type(value)),
        "size": [int(size) for size in value.shape],
        "dtype": str(value.dtype).removeprefix("torch."),
        "context": plain,
        "v": inside,
    }


def class_name(kind: type) -> str:
    """Return the qualified name of a class; it is empty where it would be absurdly long."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if len(name) <= _LONGEST_NAME else ""


def _context(encoder: Encoder, context: Any) -> JsonValue:
    sink, objects = encoder.sink, encoder.objects

    def refuse(_name: str, tensor: Any) -> NoReturn:
        encoder.refuse(tensor, "in the context of a tensor subclass is not plain", _WAY_OUT)

    encoder.sink, encoder.objects = refuse, None
    try:
        return encoder.value(context)
    finally:
        encoder.sink, encoder.objects = sink, objects


def decode(decoder: Decoder, tree: dict[str, Any], live: Any) -> Any:
    """Return the tensor that a stored wrapper becomes, or without a live one a dict of what is stored of it."""
    node = _parsed(decoder, tree)
    if decoder.wrappers is not None:
        found = decoder.wrappers(node, live, decoder.where())
        if found is not NotImplemented:
            return found
        decoder.note_plain()
    return _as_dict(decoder, node, live)


def _as_dict(decoder: Decoder, node: Wrapper, live: Any) -> dict[str, Any]:
    lives = live.get("tensors") if isinstance(live, dict) else None
    lives = lives if isinstance(lives, dict) else {}
    return {
        "class": node.class_name,
        "tensors": {
            name: (
                _as_dict(decoder, part, lives.get(name))
                if isinstance(part, Wrapper)
                else decoder.tensor(part, lives.get(name))
            )
            for name, part in node.inside.items()
        },
        "context": decoder.within("context", node.context),
        "shape": tuple(node.size),
        "dtype": torch_values.to_dtype(decoder, node.dtype),
    }


def _parsed(decoder: Decoder, tree: dict[str, Any]) -> Wrapper:
    decoder.enter()
    inside: dict[str, str | Wrapper] = {}
    if type(tree["v"]) is not dict or type(tree["class"]) is not str or type(tree["dtype"]) is not str:
        decoder.fail("a tensor of a subclass that does not look like one")
    if type(tree["size"]) is not list or not all(type(n) is int and 0 <= n < 1 << 62 for n in tree["size"]):
        decoder.fail("a tensor of a subclass with a malformed size")
    for name, part in tree["v"].items():
        decoder.keys[-1] = name
        tag = decoder.tag(part) if type(part) is dict and "$" in part else None
        if tag == TAG:
            inside[name] = _parsed(decoder, part)
        elif tag == "tensor" and type(part["v"]) is str:
            inside[name] = part["v"]
        else:
            decoder.fail("no tensor inside a tensor of a subclass")
    decoder.keys.pop()
    return Wrapper(tree["class"], inside, tree["context"], tuple(tree["size"]), tree["dtype"])


def of_live(value: Any, encode_tree: Callable[..., JsonValue]) -> tuple[Wrapper, dict[str, Any]]:
    """Return what would be stored of a live wrapper, and the plain tensors inside by the attributes that lead to
    them. ``encode_tree`` is ``jsontree.encode``. Raises ``UnsupportedValue``."""
    leaves: dict[str, Any] = {}
    tree = encode_tree(value, "", leaves.__setitem__)
    node = _of_encoded(tree)
    return node, {path: leaves[name] for path, name in node.leaves()}


def _of_encoded(tree: JsonValue) -> Wrapper:
    if not isinstance(tree, dict):
        raise UnsupportedValue("no tensor of a wrapping subclass")
    node: dict[str, Any] = tree
    inside = {name: part["v"] if part["$"] == "tensor" else _of_encoded(part) for name, part in node["v"].items()}
    return Wrapper(node["class"], inside, node["context"], tuple(node["size"]), node["dtype"])


def _bare(name: str) -> str:
    return name.rpartition(".")[2]
