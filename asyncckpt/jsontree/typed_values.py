"""These values have types that only a program can name: enums, dataclasses, named tuples, subclasses of ``str`` and of
numbers, and OmegaConf's configurations.

They are stored as plain data with a tag for the kind of type, and never with the type's name. What they become again is
decided by the *live* value at their place: its type is used, and its names have to be those that were saved. Where
there is no such live value, they are the plain data. So reading a file imports nothing and calls no class that the file
chose, and instances are made without running ``__init__``, ``__new__`` or ``__post_init__`` of their class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from asyncckpt.errors import UnsupportedValue
from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    from asyncckpt.jsontree.decode import Decoder
    from asyncckpt.jsontree.encode import Encoder

#: Exact values of these types are made of an instance of a subclass, without calling a method of it.
_BASES: Final[dict[type, Callable[[Any], Any]]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
}
_BASE_NAMES: Final = {base.__name__: base for base in _BASES}


@dataclasses.dataclass(slots=True)
class Live:
    """The live value whose types a decoded tree gets, where it holds values whose types only a program can name (see
    this module). ``decode`` adds the paths of those that became plain data, because nothing of their kind lives at
    their place, to ``untyped``; and to ``mismatched`` those that their live type does not take, with the reason: the
    live value stays there."""

    value: Any
    untyped: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)


# -- to JSON -----------------------------------------------------------------------------------------------------------


def encode(encoder: Encoder, value: Any) -> JsonValue:
    """Encode a value of one of these kinds; refuse any other."""
    kind = type(value)
    if isinstance(value, enum.Enum):
        return {"$": "enum", "name": value.name, "v": encoder.inside(value, "value", value._value_)}
    if is_dataclass(value):
        return _dataclass(encoder, value)
    if fields_of_tuple(value) is not None:
        return _namedtuple(encoder, value)
    config = _config_kind(value)
    if config is not None:
        return {"$": config, "v": encoder.inside(value, "content", _container(value))}
    base = _base_of(kind)
    if base is None:
        encoder.refuse(value)
    if _has_attributes(value, base):
        encoder.refuse(value, f"is a {base.__name__} with attributes of its own, and cannot be stored exactly")
    return {"$": "subclass", "of": base.__name__, "v": encoder.value(_BASES[base](value))}


def _dataclass(encoder: Encoder, value: Any) -> JsonValue:
    names = [field.name for field in dataclasses.fields(value)]
    extra = attributes_beside_fields(value)
    if extra:
        encoder.refuse(
            value,
            f"has attributes that are no fields of it ({', '.join(map(str, extra[:5]))})",
            "make them fields, or convert it to plain values",
        )
    absent = [name for name in names if not hasattr(value, name)]
    if absent:
        encoder.refuse(value, f"has no value for its field {absent[0]!r}", "give it one, or convert it to a dict")
    return {"$": "dataclass", "v": encoder.mapping({name: getattr(value, name) for name in names}, owner=value)}


def attributes_beside_fields(value: Any) -> list[str]:
    """Return the names of a dataclass's attributes that are no fields of it, and would be lost."""
    names = {field.name for field in dataclasses.fields(value)}
    return [name for name in getattr(value, "__dict__", ()) if name not in names and not _is_cached(value, name)]


def _is_cached(value: Any, name: str) -> bool:
    """Whether the attribute is a cached property's value, which is computed again from the fields."""
    return isinstance(getattr(type(value), name, None), functools.cached_property)


def _namedtuple(encoder: Encoder, value: Any) -> JsonValue:
    if getattr(value, "__dict__", None):
        encoder.refuse(value, "has attributes beside its fields, and cannot be stored exactly")
    return {"$": "namedtuple", "v": encoder.mapping(dict(zip(value._fields, value, strict=True)), owner=value)}


def _has_attributes(value: Any, base: type) -> bool:
    below = type(value).__mro__[: type(value).__mro__.index(base)]
    return bool(getattr(value, "__dict__", None)) or any(vars(one).get("__slots__") for one in below)


# -- what a live value is ----------------------------------------------------------------------------------------------


def is_dataclass(value: Any) -> bool:
    """Whether it is an instance of a dataclass that holds nothing but its attributes: no subclass of dict, say."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__new__ is object.__new__


def fields_of_tuple(value: Any) -> tuple[str, ...] | None:
    """Return the names of a named tuple's fields, or None for any other value."""
    names = getattr(type(value), "_fields", None) if isinstance(value, tuple) else None
    if type(names) is not tuple or len(names) != len(value) or not all(type(name) is str for name in names):
        return None
    return names


def _base_of(kind: type) -> type | None:
    """Return the type of plain data that ``kind`` is a subclass of, or None for any other type and for those that have
    a row of their own in the tables."""
    # a class of another library may have more behind it than Python's own layout of the base shows
    found = next((base for base in _BASES if issubclass(kind, base) and kind is not base), None)
    if found is None or issubclass(kind, enum.Enum) or kind is bool or kind.__module__.partition(".")[0] == "numpy":
        return None
    return found


def _config_kind(value: Any) -> str | None:
    """Return the tag of OmegaConf's configurations, or None for any other value. Imports nothing."""
    omegaconf = sys.modules.get("omegaconf")
    for tag in ("DictConfig", "ListConfig"):
        if omegaconf is not None and type(value) is getattr(omegaconf, tag, None):
            return tag
    return None


def _container(config: Any) -> Any:
    """Return a configuration as plain data. Interpolations and missing values stay the text that they are."""
    omegaconf = sys.modules["omegaconf"]
    return omegaconf.OmegaConf.to_container(config, resolve=False, throw_on_missing=False, enum_to_str=False)


# -- to the live value's type ------------------------------------------------------------------------------------------


def needs_live(tree: JsonValue, *, scalars: bool = True) -> bool:
    """Whether a tree holds a value that only a live one can give its type; with ``scalars=False``, one that is more
    than a number or text of a subclass. A tensor of a subclass is such a value."""
    stack: list[JsonValue] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            tag = node.get("$")
            if isinstance(tag, str) and (tag in TAGS or tag == "wrapper") and (scalars or tag != "subclass"):
                return True
            stack.extend(node.values())
    return False


def lives_of_fields(decoder: Decoder, tree: dict[str, Any], live: Any) -> dict[str, Any] | None:
    """Return what lives in the fields of a dataclass or a named tuple. Nothing does where ``live`` is of another kind.
    Returns None, and notes why, where it is of this kind and has other fields than were saved."""
    stored = tree["v"]
    if type(stored) is not dict or "$" in stored:
        decoder.fail("fields that are none")
    names = _fields_of(tree, live)
    if names is None:
        return {}
    lost, new = [name for name in stored if name not in names], [name for name in names if name not in stored]
    if lost or new:
        words = [f"{what} {', '.join(them[:5])}" for what, them in (("lacks", lost), ("adds", new)) if them]
        decoder.note(f"{type(live).__name__} {' and '.join(words)}, against what was saved")
        return None
    return {name: getattr(live, name, None) for name in names}


def state_of_object(live: Any) -> list[Any]:
    """Return what lives in the state that an object is stored by, in a list as that is. Only a dataclass tells without
    being called."""
    return (
        [{field.name: getattr(live, field.name, None) for field in dataclasses.fields(live)}]
        if is_dataclass(live)
        else []
    )


def of_fields(decoder: Decoder, tree: dict[str, Any], values: dict[str, Any], live: Any) -> Any:
    """Return a new dataclass or named tuple of the live one's type with these values of its fields, or plain data: a
    dict or a tuple."""
    typed = _fields_of(tree, live) is not None
    if not typed:
        decoder.note_plain()
    if tree["$"] == "namedtuple":  # a live one's fields may have changed places
        return tuple.__new__(type(live), [values[name] for name in live._fields]) if typed else tuple(values.values())
    if not typed:
        return values
    made = object.__new__(type(live))
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _fields_of(tree: dict[str, Any], live: Any) -> Sequence[str] | None:
    """Return the fields of a live value that is of the kind that the tree's tag says, or None for any other."""
    if tree["$"] == "namedtuple":
        return fields_of_tuple(live)
    return [field.name for field in dataclasses.fields(live)] if is_dataclass(live) else None


def _to_enum(decoder: Decoder, tree: dict[str, Any], live: Any) -> Any:
    name, stored = tree["name"], tree["v"]
    if not (name is None or type(name) is str):
        decoder.fail("a member's name that is no str")
    if not isinstance(live, enum.Enum):
        decoder.note_plain()
        return decoder.within("value", stored)
    kind = type(live)
    try:
        member: Any = (
            kind(stored) if isinstance(live, enum.Flag) and type(stored) is int else kind.__members__[name or ""]
        )
        if member.name == name and decoder.encoded(member.value) == stored:
            return member
    except (KeyError, ValueError, UnsupportedValue):
        pass
    decoder.note(f"{kind.__name__} has no member {name!r:.80} of the value that was saved")
    return live


def _to_subclass(decoder: Decoder, tree: dict[str, Any], live: Any) -> Any:
    base = _BASE_NAMES.get(tree["of"]) if type(tree["of"]) is str else None
    value = decoder.value(tree["v"])
    if base is None or type(value) is not base:
        decoder.fail("an instance of a subclass that is none")
    if _base_of(type(live)) is base:
        return base.__new__(type(live), value)
    decoder.note_plain()
    return value


def _to_config(decoder: Decoder, tree: dict[str, Any], live: Any) -> Any:
    """Return plain data as a configuration like the live one: with its flags, its parent and its structured type."""
    content = decoder.within("content", tree["v"])
    if _config_kind(live) != tree["$"]:
        decoder.note_plain()
        return content
    omegaconf = sys.modules["omegaconf"]
    meta = live._metadata
    try:
        if dataclasses.is_dataclass(meta.object_type):
            made = omegaconf.OmegaConf.structured(meta.object_type)
            with omegaconf.open_dict(made):
                made.merge_with(content)
            for flag, on in (meta.flags or {}).items():
                omegaconf.OmegaConf.set_flag(made, flag, on)
        else:
            made = type(live)(content, element_type=meta.element_type, flags=meta.flags)
        if _container(made) != content:
            raise ValueError("it holds other keys than the configuration that was saved")
    except Exception as error:  # OmegaConf's own errors, whichever this version has
        decoder.note(f"{type(error).__name__}: {error}")
        return live
    made._set_parent(live._get_parent())
    return made


DECODERS: Final[dict[str, Callable[[Any, dict[str, Any], Any], Any]]] = {
    "enum": _to_enum,
    "subclass": _to_subclass,
    "DictConfig": _to_config,
    "ListConfig": _to_config,
}
WITH_FIELDS: Final = frozenset({"dataclass", "namedtuple"})
#: A tree that has none of these tags is decoded without looking at live values.
TAGS: Final = frozenset({*DECODERS, *WITH_FIELDS})
#: The fields that some tags have beside ``$`` and ``v``.
FIELDS: Final = {"enum": frozenset({"name"}), "subclass": frozenset({"of"})}
