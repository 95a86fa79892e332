"""A hostile tree or text is refused as damage, and does nothing else."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged

T = torch.zeros(1)


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
