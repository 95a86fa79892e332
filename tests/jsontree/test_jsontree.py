"""Plain values come back to the bit, what cannot is refused by its path, and a hostile tree does nothing."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import json
import math
import struct
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from support.examples import examples

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, InvalidOption, UnsupportedValue

LARGE = 20_000  # float64 elements: over 64 KiB


def round_trip(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    tree = jsontree.encode(value, "", tensors.__setitem__, "part")
    assert jsontree.tensor_names(tree) == list(tensors)
    return jsontree.decode(jsontree.loads(jsontree.dumps(tree), "state.json"), tensors.__getitem__)


def refused(value: Any) -> str:
    with pytest.raises(UnsupportedValue) as caught:
        jsontree.encode(value, "", lambda name, tensor: None, "optimizer")
    return str(caught.value)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, in types too, and in the order of dicts."""
    assert type(a) is type(b)
    if isinstance(a, float) and not isinstance(a, np.generic):
        assert struct.pack(">d", a) == struct.pack(">d", b)
    elif isinstance(a, complex) and not isinstance(a, np.generic):
        assert_same([a.real, a.imag], [b.real, b.imag])
    elif isinstance(a, np.generic | np.ndarray):
        assert (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert len(a) == len(b)
        assert getattr(a, "default_factory", 0) is getattr(b, "default_factory", 0)
        for (key_a, item_a), (key_b, item_b) in zip(a.items(), b.items(), strict=True):
            assert_same(key_a, key_b)
            assert_same(item_a, item_b)
    elif isinstance(a, list | tuple | collections.deque):
        assert getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
        for item_a, item_b in zip(a, b, strict=True):
            assert_same(item_a, item_b)
    elif isinstance(a, set | frozenset):
        assert _text_of(a) == _text_of(b)
    elif isinstance(a, argparse.Namespace | types.SimpleNamespace):
        assert_same(vars(a), vars(b))
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def _text_of(member: Any) -> str:
    """Equal for equal members of sets, whatever order nested sets happen to have."""
    if isinstance(member, tuple | frozenset | set) and not isinstance(member, torch.Size):
        parts = [_text_of(one) for one in member]
        return f"{type(member).__name__}({parts if isinstance(member, tuple) else sorted(parts)})"
    return repr(member)


def _namespace(empty: Any, attributes: dict[str, Any]) -> Any:
    vars(empty).update(attributes)  # setattr would refuse names such as __class__
    return empty


any_text = st.text(st.characters(), max_size=8)  # surrogates included
floats = st.one_of(st.floats(), st.binary(min_size=8, max_size=8).map(lambda bits: struct.unpack(">d", bits)[0]))
ints = st.builds(lambda number, shift: number << shift, st.integers(), st.sampled_from([0, 0, 0, 1984, 3000]))
numpy_dtypes = st.one_of(
    st_numpy.boolean_dtypes(),
    st_numpy.integer_dtypes(endianness="?"),
    st_numpy.unsigned_integer_dtypes(endianness="?"),
    st_numpy.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    st_numpy.complex_number_dtypes(endianness="?", sizes=(64, 128)),
)
hashable_leaves = st.one_of(
    st.none(),
    st.booleans(),
    ints,
    floats,
    any_text,
    st.binary(max_size=8),
    st.complex_numbers(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.device("cuda:3"), torch.device("cpu")]),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
)
small_shapes = st_numpy.array_shapes(min_dims=0, min_side=0, max_side=3)
hashable = st.recursive(
    hashable_leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
)
leaves = st.one_of(
    hashable,
    st.binary(max_size=8).map(bytearray),
    numpy_dtypes.flatmap(st_numpy.from_dtype),
    numpy_dtypes.flatmap(lambda dtype: st_numpy.arrays(dtype, small_shapes)),
    st.sets(hashable, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    by_text = st.dictionaries(st.one_of(any_text, st.just("$")), inner, max_size=4)
    by_any = st.dictionaries(hashable, inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.builds(collections.deque, st.lists(inner, max_size=3), st.sampled_from([None, 3, 9])),
        by_text,
        by_any,
        by_any.map(collections.OrderedDict),
        by_any.map(lambda d: collections.defaultdict(list, d)),
        by_any.map(lambda d: collections.defaultdict(None, d)),
        st.dictionaries(hashable, st.integers(), max_size=3).map(collections.Counter),
        st.dictionaries(any_text, inner, max_size=3).map(lambda d: _namespace(argparse.Namespace(), d)),
        st.dictionaries(any_text, inner, max_size=3).map(lambda d: _namespace(types.SimpleNamespace(), d)),
    )


@examples(300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.recursive(leaves, lambda inner: st.deferred(lambda: containers(inner)), max_leaves=12))
def test_any_supported_value_comes_back_to_the_bit(value: Any) -> None:
    assert_same(value, round_trip(value))


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        struct.unpack(">d", bytes.fromhex("7ff8000000abcdef"))[0],
        struct.unpack(">d", bytes.fromhex("fff4000000000001"))[0],
        -math.inf,
        5e-324,
        complex(-0.0, math.nan),
        2**100_000,
        -(10**5000),
        "\ud800 alone, \ud83d\ude00 as two, 😀 as one",
        {"\ud83d\ude00": 1, "😀": 2},
        {"$": "tensor", "v": "not a tensor"},
        {1: "int", "1": "str", None: 0, (1, "a"): []},
        np.float64(0.1),
        np.float32(np.nan),
        np.arange(24, dtype=">f4").reshape(2, 3, 4).transpose(2, 0, 1),
        np.zeros((3, 0, 2)),
        np.array(True),
        collections.defaultdict(dict, {"a": {}}),
        collections.deque([1, 2], maxlen=2),
        torch.Size([2, 3]),
        torch.device("cuda", 1),
        torch.float8_e4m3fn,
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values_come_back_to_the_bit(value: Any) -> None:
    assert_same(value, round_trip(value))


def test_every_dtype_of_torch_is_known() -> None:
    for dtype in (one for one in vars(torch).values() if isinstance(one, torch.dtype)):
        assert round_trip(dtype) is dtype


def test_a_huge_int_is_read_under_the_smallest_digit_limit() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        for value in (2**2048 - 1, 2**2048, -(2**2049)):
            assert round_trip(value) == value
    finally:
        sys.set_int_max_str_digits(before)


def test_numpy_ints_of_one_size_are_one_type() -> None:
    assert round_trip(np.longlong(-3)) == np.int64(-3)


def test_a_decoded_array_can_be_written_to() -> None:
    array = round_trip(np.arange(3))
    array[0] = 7
    assert array[0] == 7


def test_equal_sets_are_stored_as_equal_bytes() -> None:
    names = [f"layer{i}" for i in range(50)]
    first, second = (jsontree.dumps(jsontree.encode(set(order), "", _no_tensor)) for order in (names, names[::-1]))
    assert first == second
    stored = json.loads(first)["v"]
    assert stored == sorted(stored)  # hashes of str differ from process to process, so order must not come from them


# -- tensors -----------------------------------------------------------------------------------------------------------


def _no_tensor(name: str, tensor: torch.Tensor) -> None:
    raise AssertionError(name)


def _names(value: Any, path: str = "") -> list[str]:
    found: list[str] = []
    tree = jsontree.encode(value, path, lambda name, _: found.append(name))
    assert jsontree.tensor_names(tree) == found
    return found


T = torch.zeros(1)


@pytest.mark.parametrize(
    ("value", "path", "names"),
    [
        (T, "", ["value"]),
        (T, "ema", ["ema"]),
        ({"a": [T, {"b": T}]}, "", ["a.0", "a.1.b"]),
        ({"a": T}, "ema", ["ema.a"]),
        ({0: {"exp_avg": T}}, "", ["0.exp_avg"]),
        ({"a.b": T, "a": {"b": T, "b~2": T}}, "", ["a.b", "a.b~2", "a.b~2~2"]),
        ({1: T, "1": T}, "", ["1", "1~2"]),
        ({"": T, "value": T}, "", ["value", "value~2"]),
        ({(1, 2): T, None: T}, "", ["0", "1"]),
        ({"__metadata__": T}, "", ["__metadata__~2"]),
        ({"\ud800": T}, "", ["\\ud800"]),
        (torch.nn.Parameter(T), "", ["value"]),
    ],
)
def test_tensor_names_follow_the_path_and_never_collide(value: Any, path: str, names: list[str]) -> None:
    assert _names(value, path) == names


def test_tensors_with_colliding_paths_keep_their_own_values() -> None:
    value = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "x": [torch.tensor(3)], "x.0": torch.tensor(4)}
    assert_same(value, round_trip(value))


def test_a_tensor_is_handed_over_uncopied() -> None:
    given_to_sink: list[torch.Tensor] = []
    jsontree.encode({"a": T}, "", lambda name, tensor: given_to_sink.append(tensor))
    assert given_to_sink[0] is T


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "uint64", "float16", "float32", "float64", "complex64"])
def test_a_large_array_goes_to_the_shards_and_not_into_the_json(dtype: str) -> None:
    array = (np.arange(LARGE * 8) % 2).astype(dtype).reshape(2, -1)
    tensors: dict[str, torch.Tensor] = {}
    tree = jsontree.encode({"x": array}, "", tensors.__setitem__)
    assert list(tensors) == ["x"]
    assert len(jsontree.dumps(tree)) < 200
    assert_same(array, jsontree.decode(tree, tensors.__getitem__)["x"])


@pytest.mark.parametrize("dtype", [">f8", "complex128"])
def test_a_large_array_without_a_torch_dtype_stays_in_the_json(dtype: str) -> None:
    array = np.arange(LARGE).astype(dtype)
    assert_same(array, jsontree.decode(jsontree.encode(array, "", _no_tensor), lambda name: T))


@pytest.mark.filterwarnings("error")
def test_read_only_and_strided_large_arrays_are_stored() -> None:
    array = np.arange(LARGE * 2.0)
    array.setflags(write=False)
    for view in (array, array[::-2], array.reshape(2, -1).T):
        assert round_trip(view).tolist() == view.tolist()


def test_an_array_sees_values_that_are_read_after_decoding() -> None:
    tree = jsontree.encode(np.full(LARGE, 7.0), "", lambda name, tensor: None)
    later = torch.zeros(LARGE, dtype=torch.float64)
    decoded = jsontree.decode(tree, lambda name: later)
    later.fill_(7.0)
    assert (decoded == 7.0).all()


def test_arrays_are_asked_for_apart_and_must_be_in_host_memory() -> None:
    tree = jsontree.encode({"t": T, "a": np.zeros(LARGE)}, "", lambda name, tensor: None)
    asked: dict[str, str] = {}

    def tensors(name: str) -> torch.Tensor:
        asked[name] = "tensors"
        return T

    def arrays(name: str) -> torch.Tensor:
        asked[name] = "arrays"
        return torch.zeros(LARGE, dtype=torch.float64)

    jsontree.decode(tree, tensors, arrays)
    assert asked == {"t": "tensors", "a": "arrays"}
    with pytest.raises(InvalidOption, match="cpu"):
        jsontree.decode(tree["a"], lambda name: torch.zeros(LARGE, dtype=torch.float64, device="meta"))  # type: ignore[index,call-overload]


# -- real training state -----------------------------------------------------------------------------------------------


def test_a_real_training_state_comes_back_and_loads() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 3, 7]),
    ]
    for _ in range(4):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    rng = np.random.default_rng(5)
    rng.random(3, dtype=np.float32)
    state = {
        "optimizer": optimizer.state_dict(),
        "schedules": [schedule.state_dict() for schedule in schedules],
        "rng": rng.bit_generator.state,
        "legacy": np.random.get_state(),
    }
    assert type(state["schedules"][1]["milestones"]) is collections.Counter
    restored = round_trip(state)
    assert_same(state, restored)
    again = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=1.0, amsgrad=True)
    again.load_state_dict(restored["optimizer"])
    assert_same(optimizer.state_dict(), again.state_dict())
    rng_again = np.random.default_rng()
    rng_again.bit_generator.state = restored["rng"]
    assert rng.random() == rng_again.random()


# -- what cannot be stored ---------------------------------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Text("a"),
        np.str_("a"),
        object(),
        len,
        lambda: 0,
        json,
        int,
        Point(1, 2),
        datetime.date(2020, 1, 1),
        np.datetime64("2020-01-01"),
        np.longdouble(1),
        np.array(["a"]),
        np.array([object()]),
        np.ma.masked_array([1]),
        collections.defaultdict(lambda: 0),
        range(3),
        ...,
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unsupported_value_is_refused_naming_its_path_and_the_way_out(value: Any) -> None:
    message = refused({"param_groups": [{"foo": value}]})
    assert message.startswith("state['optimizer']['param_groups'][0]['foo']: ")
    assert type(value).__name__ in message
    assert "state_dict" in message


def test_an_unsupported_key_or_member_is_refused_naming_its_path() -> None:
    assert "state['optimizer']['a'][<key 1>]" in refused({"a": {1: 0, Text("b"): 0}})
    assert "state['optimizer'][7]['x']" in refused({7: {"x": object()}})
    assert "in a set has no stable name" in refused({"a": {T}})


def test_a_cycle_is_refused() -> None:
    loop: dict[str, Any] = {"a": []}
    loop["a"].append(loop)
    assert "state['optimizer']['a'][0]: a value of type dict contains itself" in refused(loop)


def test_an_object_reached_twice_is_no_cycle() -> None:
    shared = [1]
    assert round_trip([shared, shared, {"a": shared}]) == [[1], [1], {"a": [1]}]


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}, lambda v: collections.defaultdict(int, a=v)],
)
def test_depth_is_limited_before_the_stack_is_and_what_encodes_loads(wrap: Any) -> None:
    value: Any = np.zeros(LARGE)
    for _ in range(200):
        value = wrap(value)
    encoded = round_trip(value)
    assert type(encoded) is type(value)
    assert "over 200 deep" in refused(wrap(value))


# -- hostile trees -----------------------------------------------------------------------------------------------------


def _nested(levels: int) -> Any:
    tree: Any = 0
    for _ in range(levels):
        tree = [tree]
    return tree


def _array(dtype: Any = "<f4", shape: Any = (2,), v: Any = "AAAAAAAAAAA=") -> dict[str, Any]:
    return {"$": "ndarray", "dtype": dtype, "shape": list(shape) if type(shape) is tuple else shape, "v": v}


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "os.system", "v": "true"},
        {"$": "__class__", "v": 1},
        {"$": ["list"], "v": 1},
        {"$": None, "v": 1},
        {"$": "tuple"},
        {"$": "tuple", "v": [], "extra": 1},
        {"$": "tuple", "v": {"a": 1}},
        {"$": "tuple", "v": "ab"},
        {"$": "set", "v": [[1]]},
        {"$": "set", "v": [1, 1]},
        {"$": "dict", "v": ["a"]},
        {"$": "dict", "v": [["a"], 1]},
        {"$": "dict", "v": ["a", 1, "a", 2]},
        {"$": "Counter", "v": {"a": 1}},
        {"$": "defaultdict", "of": "eval", "v": []},
        {"$": "defaultdict", "of": ["list"], "v": []},
        {"$": "defaultdict", "v": []},
        {"$": "deque", "maxlen": 1, "v": [1, 2]},
        {"$": "deque", "maxlen": -1, "v": []},
        {"$": "deque", "maxlen": 2**70, "v": []},
        {"$": "deque", "maxlen": True, "v": [1]},
        {"$": "Namespace", "v": [1, 2]},
        {"$": "int", "v": "zz"},
        {"$": "int", "v": 5},
        {"$": "float", "v": "7ff8"},
        {"$": "float", "v": "7ff80000 0000000"},
        {"$": "float", "v": 1.0},
        {"$": "complex", "v": "00"},
        {"$": "str", "v": "ff"},
        {"$": "bytes", "v": "not base64"},
        {"$": "bytes", "v": "ä"},
        {"$": "bytes", "v": [1]},
        {"$": "dtype", "v": "load"},
        {"$": "dtype", "v": ["float32"]},
        {"$": "Size", "v": ["a"]},
        {"$": "Size", "v": [2**63]},
        {"$": "device", "v": "cuda:0"},
        {"$": "device", "v": ["warp", 0]},
        {"$": "device", "v": ["cuda", 300]},
        {"$": "device", "v": ["cuda", -1]},
        {"$": "numpy", "dtype": "|O", "v": "0000000000000000"},
        {"$": "numpy", "dtype": "<f4", "v": "00"},
        {"$": "numpy", "dtype": "|b1", "v": "02"},
        {"$": "tensor", "v": 5},
        {"$": "tensor", "v": None},
        _array(dtype="|O8"),
        _array(dtype=5),
        _array(shape=(3,)),
        _array(shape=(-2,)),
        _array(shape=(-1, -2)),
        _array(shape=(True, 2)),
        _array(shape=(2.0,)),
        _array(shape="ab"),
        _array(shape=(2**62, 2**62)),
        _array(shape=(0, 2**62, 2**62), v=""),
        _array(shape=(1,) * 65, v="AAAAAA=="),
        _array(v="AAAAAAAAAA=="),
        _array(v="AAAAAAAAAAAA"),
        _array(v=[0, 0]),
        _array(dtype="|b1", shape=(1,), v="Ag=="),
        _array(v={"$": "tensor", "v": "other shape"}),
        _array(shape=(1,), dtype="<f8", v={"$": "tensor", "v": "other dtype"}),
        _array(shape=(1,), v={"$": "tuple", "v": "x"}),
        _array(shape=(1,), v={"$": "tensor", "v": 3}),
        _nested(201),
        {"$": "tuple", "v": _nested(201)},
        (1,),
        object(),
    ],
    ids=lambda tree: str(tree).partition(" at 0x")[0],
)
def test_a_hostile_tree_is_refused_as_damage(tree: Any) -> None:
    with pytest.raises(CheckpointDamaged):
        jsontree.decode({"a": [tree]}, lambda name: T)


def test_an_error_of_the_tensor_source_passes_through() -> None:
    def missing(name: str) -> torch.Tensor:
        raise KeyError(name)

    with pytest.raises(KeyError):
        jsontree.decode({"$": "tensor", "v": "a"}, missing)


TAGS = ["tuple", "set", "dict", "defaultdict", "ndarray", "numpy", "deque", "Size", "device", "str", "tensor"]
json_trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.fixed_dictionaries(
            {
                "$": st.sampled_from(TAGS),
                "v": inner,
            },
            optional={"dtype": st.sampled_from(["<f4", "|b1"]), "shape": inner, "maxlen": inner, "of": inner},
        ),
    ),
)


@examples(300)
@given(json_trees)
def test_a_random_tree_decodes_or_is_damage_and_nothing_else(tree: Any) -> None:
    with contextlib.suppress(CheckpointDamaged):
        jsontree.decode(tree, lambda name: T)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{} {}",
        b"{}x",
        b"[NaN]",
        b"[Infinity]",
        b"[-Infinity]",
        b"[1e999]",
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":1,"\\u0061":1}',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b"[" * 501 + b"]" * 501,
        b'{"a":' * 501 + b"1" + b"}" * 501,
        b'["\\"",' * 501 + b"1" + b"]" * 501,
        b"[" * 100_000,
        b"[" + b"1" * 4301 + b"]",
        b"[-" + b"1" * 4301 + b"]",
        b"01",
        b"'a'",
        b'"\n"',
    ],
    ids=lambda data: repr(data[:20]),
)
def test_text_that_is_not_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointDamaged, match=r"runs/a/state\.json"):
        jsontree.loads(data, "runs/a/state.json")


def test_a_long_int_is_refused_where_python_would_not_stop_it() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(CheckpointDamaged, match="4300"):
            jsontree.loads(b"[" + b"9" * 100_000 + b"]", "state.json")
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    "value",
    ["0" * 10_000, "[" * 1000, '\\"[{' * 1000, ["]" * 600, [["["] * 600]], [[]] * 600, 10**600, -(10**600), "\\" * 999],
    ids=lambda value: repr(value)[:12],
)
def test_harmless_text_is_not_taken_for_an_attack(value: Any) -> None:
    assert jsontree.loads(jsontree.dumps(value), "state.json") == value


@pytest.mark.parametrize("levels", [500, 501])
def test_brackets_inside_strings_do_not_count_as_depth(levels: int) -> None:
    data = b'["]\\"[",' * levels + b"0" + b"]" * levels
    if levels <= 500:
        assert jsontree.loads(data, "state.json")
    else:
        with pytest.raises(CheckpointDamaged, match="500"):
            jsontree.loads(data, "state.json")


def test_written_text_is_one_line_of_ascii_in_order() -> None:
    assert jsontree.dumps({"b": [1, 2.5], "a": "ü"}) == b'{"b":[1,2.5],"a":"\\u00fc"}\n'
    with pytest.raises(ValueError, match="JSON"):
        jsontree.dumps({"a": math.nan})
