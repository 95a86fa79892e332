"""Values whose types only a program can name get the live value's type, and are plain data without one."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import sys
import typing
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.json_trees import through_live

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue


class Colour(enum.Enum):
    RED = "r"
    BLUE = (1, 2)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mode(enum.StrEnum):
    TRAIN = "train"


class Bits(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: Any
    y: Any


class Text(str):
    __slots__ = ()


class Count(int):
    pass


class Share(float):
    pass


class Raw(bytes):
    pass


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float
    inner: Any = None
    seen: Any = dataclasses.field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        called.append("post_init")


@dataclasses.dataclass(slots=True)
class Slim(typing.Generic[typing.TypeVar("T")]):
    a: Any

    def __init__(self, a: Any) -> None:
        called.append("init")
        self.a = a


called: list[str] = []


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for one in dataclasses.fields(a):
            same(getattr(a, one.name), getattr(b, one.name))
    elif isinstance(a, dict):
        assert list(map(repr, a)) == list(map(repr, b))
        for key_a, key_b in zip(a, b, strict=True):
            same(key_a, key_b)
            same(a[key_a], b[key_b])
    elif isinstance(a, list | tuple | collections.deque):
        assert len(a) == len(b)
        for item_a, item_b in zip(a, b, strict=True):
            same(item_a, item_b)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, set):
        assert sorted(map(repr, a)) == sorted(map(repr, b))
    else:
        assert repr(a) == repr(b)


VALUES = [
    Colour.RED,
    Colour.BLUE,
    Level.HIGH,
    Mode.TRAIN,
    Bits.A | Bits.B,
    Bits(0),
    Point(1, [Point(Level.LOW, "b")]),
    Text("\ud83d\ude00"),
    Count(-(2**3000)),
    Share(float("nan")),
    Raw(b"\0"),
    torch.__version__,
    Settings(0.1, {"a": Settings(1.0, torch.ones(2))}),
    Slim({"$": Point(torch.zeros(1), None)}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: v,
        lambda v: {"a": [v, (v,)], "$": v},
        lambda v: collections.deque([collections.OrderedDict([(1, v)])]),
        lambda v: collections.defaultdict(list, {(): v}),
    ],
    ids=["bare", "lists", "ordered", "defaulting"],
)
def test_the_live_values_type_comes_back(value: Any, wrap: Any) -> None:
    value = wrap(value)
    called.clear()
    found, noted = through_live(value, value)
    assert called == []
    same(value, found)
    assert (noted.untyped, noted.mismatched) == ([], [])


plain = st.recursive(
    st.sampled_from([v for v in VALUES if isinstance(v, enum.Enum | str | bytes | int)]) | st.integers() | st.text(),
    lambda inner: st.one_of(
        st.builds(Point, inner, inner),
        st.builds(Settings, st.floats(), inner),
        st.builds(Slim, inner),
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3) | st.sampled_from([Colour.RED, Level.LOW, 7]), inner, max_size=3),
    ),
    max_leaves=8,
)


@examples(300)
@given(plain)
def test_any_tree_of_these_kinds_comes_back_into_its_like(value: Any) -> None:
    found, noted = through_live(value, value)
    same(value, found)
    assert (noted.untyped, noted.mismatched) == ([], [])
    through_live(value, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.BLUE, (1, 2)),
        (Level.HIGH, 2),
        (Mode.TRAIN, "train"),
        (Bits.A | Bits.B, 3),
        (Point(1, Point(2, 3)), (1, (2, 3))),
        (Settings(0.5, [1]), {"rate": 0.5, "inner": [1], "seen": None}),
        (Text("a"), "a"),
        (Count(3), 3),
        ({Level.LOW: Text("x")}, {1: "x"}),
        ({Level.LOW}, {1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_without_a_live_value_it_is_plain_data_and_that_is_noted(value: Any, expected: Any) -> None:
    for live in (None, object(), 5, [], {}):
        found, noted = through_live(value, live)
        same(expected, found)
        assert noted.untyped
        assert noted.mismatched == []


def test_a_path_of_what_became_plain_is_noted() -> None:
    found, noted = through_live({"a": [Level.LOW, {"b": Point(1, 2)}]}, {"a": [Level.HIGH]})
    assert found == {"a": [Level.LOW, {"b": (1, 2)}]}
    assert type(found["a"][0]) is Level
    assert noted.untyped == ["['a'][1]['b']"]


def test_keys_and_members_find_the_type_that_lives_beside_them() -> None:
    saved = {Level.HIGH: 1, "a": 2, (Colour.RED, 0): 3}
    found, noted = through_live(saved, {"x": 0, Level.LOW: 0, (Colour.BLUE, 9): 0})
    same(saved, found)
    members, _ = through_live({Level.HIGH, 7}, {Level.LOW})
    assert {type(one) for one in members} == {Level, int}
    assert noted.untyped == []


def test_a_live_value_tells_the_type_and_nothing_else() -> None:
    found, _ = through_live([Settings(1.0, Level.HIGH)], [Settings(9.0, Level.LOW)])
    same([Settings(1.0, Level.HIGH)], found)


class _Renumbered(enum.Enum):
    RED = "other"
    BLUE = (1, 2)


class _Swapped(NamedTuple):
    y: Any
    x: Any


class _Longer(NamedTuple):
    x: Any
    y: Any
    z: Any


@dataclasses.dataclass
class _Other:
    rate: float
    more: int


@pytest.mark.parametrize(
    ("value", "live", "words"),
    [
        (Colour.RED, _Renumbered.BLUE, "no member 'RED' of the value"),
        (Level.LOW, Colour.BLUE, "no member 'LOW'"),
        (Bits.A, enum.Flag("Bits", {"B": 1}).B, "no member 'A'"),  # type: ignore[attr-defined]
        (Bits.B, enum.Flag("Bits", {"A": 1}).A, "no member 'B'"),  # type: ignore[attr-defined]
        (Point(1, 2), _Longer(7, 8, 9), "adds z"),
        (Settings(1.0), _Other(2.0, 3), "lacks inner, seen and adds more"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_type_that_changed_is_a_mismatch_and_keeps_the_live_value(value: Any, live: Any, words: str) -> None:
    found, noted = through_live({"a": value}, {"a": live})
    assert found["a"] is live
    (why,) = noted.mismatched
    assert why.startswith("['a']: ")
    assert words in why


def test_fields_that_changed_places_keep_their_values() -> None:
    found, _ = through_live(Point(1, 2), _Swapped(0, 0))
    assert found == _Swapped(y=2, x=1)


def test_a_cached_property_is_computed_again() -> None:
    @dataclasses.dataclass
    class Cached:
        side: int

        @functools.cached_property
        def area(self) -> int:
            return self.side**2

    value, live = Cached(3), Cached(4)
    assert (value.area, live.area) == (9, 16)
    found, _ = through_live(value, live)
    assert found.area == 9


class _WithAttributes(str):
    pass


class _WithSlots(str):
    __slots__ = ("a",)


def _marked(value: Any) -> Any:
    value.mark = 1
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (_marked(_WithAttributes("a")), "attributes of its own"),
        (_WithSlots("a"), "attributes of its own"),
        (_marked(_Other(1.0, 2)), "no fields of it (mark)"),
        (type("Dotted", (dict,), {})(a=1), "convert it to plain values"),
        (type("Wider", (list,), {})(), "convert it to plain values"),
        (dataclasses.make_dataclass("Sub", ["a"], bases=(dict,))(1), "convert it to plain values"),
        (torch.return_types.max((torch.ones(1), torch.ones(1))), "convert it to plain values"),
        (enum.Enum("Odd", {"A": len}).A, "convert it to plain values"),  # type: ignore[attr-defined]
        (Settings, "convert it to plain values"),
        (Level, "convert it to plain values"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_would_lose_something_is_refused_by_path_with_a_way_out(value: Any, words: str) -> None:
    with pytest.raises(UnsupportedValue) as caught:
        jsontree.encode({"a": [value]}, "", lambda name, tensor: None, "c")
    assert str(caught.value).startswith("state['c']['a'][0]")
    assert words in str(caught.value)


def test_a_field_without_a_value_is_refused() -> None:
    broken = object.__new__(_Other)
    broken.rate = 1.0
    with pytest.raises(UnsupportedValue, match="'more'"):
        through_live(broken, None)


def test_cycles_and_depth_are_refused_before_the_stack_ends() -> None:
    loop = _Other(1.0, 2)
    loop.more = [loop]  # type: ignore[assignment]
    with pytest.raises(UnsupportedValue, match="contains itself"):
        through_live(loop, None)
    for wrap in (Slim, lambda v: Point(v, 0), lambda v: Settings(0.0, v)):
        deep: Any = 0
        for _ in range(200):
            deep = wrap(deep)
        found, _ = through_live(deep, deep)
        assert type(found) is type(deep)
        with pytest.raises(UnsupportedValue, match="deep"):
            through_live(wrap(deep), None)


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "enum", "name": 5, "v": 1},
        {"$": "enum", "v": 1},
        {"$": "dataclass", "v": [1]},
        {"$": "dataclass", "v": {"$": "tuple", "v": []}},
        {"$": "dataclass", "v": {"a": 1}, "of": "os.environ"},
        {"$": "namedtuple", "v": "ab"},
        {"$": "subclass", "of": "str", "v": 1},
        {"$": "subclass", "of": "type", "v": "a"},
        {"$": "subclass", "of": ["str"], "v": "a"},
        {"$": "DictConfig", "v": {"$": "unknown", "v": 1}},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(
    "live", [None, Level.LOW, Point(1, 2), Settings(1.0), Text("a")], ids=lambda value: type(value).__name__
)
def test_a_hostile_tree_is_damage(tree: Any, live: Any) -> None:
    with pytest.raises(CheckpointDamaged):
        jsontree.decode([tree], pytest.fail, live=jsontree.Live([live]))


def test_a_name_from_the_file_is_never_an_attribute() -> None:
    """``check_fields`` comes first: nothing but the live type's own fields is ever set."""
    tree = {"$": "dataclass", "v": {"__class__": 1, "rate": 2.0}}
    noted = jsontree.Live(_Other(1.0, 2))
    assert jsontree.decode(tree, pytest.fail, live=noted) is noted.value
    assert "__class__" in noted.mismatched[0]


def test_only_later_kinds_ask_for_a_later_reader() -> None:
    def version(value: Any) -> int:
        return jsontree.version_of(jsontree.dumps(jsontree.encode(value, "", lambda name, tensor: None)))

    first = {"a": ['{"$":"enum"', np.float32(1), np.ones(2), {"$": "enum"}, (torch.ones(1), {1: 2}), float("nan")]}
    assert version(first) == 1
    later = [*VALUES, range(2), np.str_("a"), np.bytes_(b""), np.array(["a"]), np.datetime64(1, "s"), slice(1)]
    for value in later:
        assert version([first, {"b": value}]) == 4, value


def test_nothing_imports_omegaconf() -> None:
    if "omegaconf" not in sys.modules:
        through_live(VALUES, VALUES)
        assert "omegaconf" not in sys.modules
