"""Plain values, tensors and a real training state come back to the bit."""

from __future__ import annotations

import argparse
import collections
import json
import math
import struct
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from support.examples import examples
from support.json_trees import LARGE, round_trip

from asyncckpt import jsontree
from asyncckpt.errors import InvalidOption


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
