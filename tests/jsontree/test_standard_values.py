"""Values of the standard library and of NumPy come back as what they were, without any live value."""

from __future__ import annotations

import datetime
import io
import pathlib
import zoneinfo
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from support.examples import examples
from support.json_trees import round_trip

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue

UTC = datetime.UTC
EAST = datetime.timezone(datetime.timedelta(hours=5, minutes=30, microseconds=7), "Somewhere")


def same(a: Any, b: Any) -> None:
    """Equal, of one type, and alike in all that ``==`` does not look at."""
    assert type(a) is type(b)
    if isinstance(a, io.BytesIO):
        assert (a.getvalue(), a.tell()) == (b.getvalue(), b.tell())
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes())
    else:
        assert (a, repr(a)) == (b, repr(b))
        assert getattr(a, "fold", 0) == getattr(b, "fold", 0)


zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.builds(
        datetime.timezone,
        st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23)),
        st.sampled_from(["", "CET", "\ud800"]),
    ),
)
values = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=9).map(pathlib.Path),
    st.sampled_from([pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:\\a\\b"), pathlib.Path()]),
    st.dates(),
    st.datetimes(timezones=zones, allow_imaginary=True),
    st.times(timezones=zones),
    st.timedeltas(),
    zones.filter(lambda zone: zone is not None),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    st.builds(slice, st.integers() | st.none(), st.integers() | st.text(max_size=3), st.none() | st.floats(0, 1)),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5).map(np.str_),
    st.binary(max_size=5).map(np.bytes_),
    st_numpy.datetime64_dtypes(endianness="?").flatmap(st_numpy.from_dtype),
    st_numpy.timedelta64_dtypes(endianness="?").flatmap(st_numpy.from_dtype),
    st.one_of(
        st_numpy.unicode_string_dtypes(endianness="?"),
        st_numpy.byte_string_dtypes(endianness="?"),
        st_numpy.datetime64_dtypes(endianness="?"),
    ).flatmap(lambda dtype: st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, min_side=0, max_side=3))),
)


@examples(300)
@given(values)
def test_any_value_of_these_kinds_comes_back_exactly(value: Any) -> None:
    same(value, round_trip([value])[0])


@pytest.mark.parametrize(
    "value",
    [
        datetime.datetime(2026, 10, 25, 2, 30, fold=1),
        datetime.datetime(1, 1, 1, tzinfo=EAST),
        datetime.datetime.max.replace(tzinfo=UTC),
        datetime.time(23, 59, 59, 999_999, EAST, fold=1),
        datetime.timedelta.min,
        datetime.timezone(datetime.timedelta(hours=1), "UTC+01:00"),
        range(2**70, -5, -3),
        slice(None, (1, "a"), [2]),
        np.bytes_(b"a\0\0"),
        np.str_("a\0\0"),
        np.datetime64("NaT"),
        np.datetime64(7, "25us"),
        np.array(["", ""]),
        np.array(["ab", "\U0010ffff"], dtype=">U2"),
        pathlib.Path("\udcff"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values_come_back_exactly(value: Any) -> None:
    same(value, round_trip({"a": value})["a"])


def test_a_stream_keeps_its_bytes_and_its_position_and_is_a_copy() -> None:
    stream = io.BytesIO(b"0123456789")
    stream.seek(4)
    again = round_trip({"s": stream})["s"]
    same(stream, again)
    assert again.read() == b"456789"
    assert stream.tell() == 4, "saving has moved the live stream"
    stream.seek(1 << 40)
    same(stream, round_trip([stream])[0])


def test_times_and_paths_can_be_keys_and_members() -> None:
    value = {datetime.date(2026, 1, 2): 1, pathlib.Path("a"): {datetime.timedelta(1), range(3)}}
    assert round_trip(value) == value


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        (datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "astimezone"),
        (datetime.time(1, tzinfo=zoneinfo.ZoneInfo("UTC")), "astimezone"),
        (type("Stamp", (datetime.datetime,), {})(2026, 1, 1), "plain values"),
        (type("Lazy", (io.BytesIO,), {})(), "plain values"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "plain values"),
        (np.void(b"ab"), "plain values"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_come_back_exactly_is_refused_with_a_way_out(value: Any, way_out: str) -> None:
    with pytest.raises(UnsupportedValue, match=rf"state\['c'\]\['a'\]\[0\].*{way_out}"):
        jsontree.encode({"a": [value]}, "", lambda name, tensor: None, "c")


def test_a_closed_stream_is_refused() -> None:
    stream = io.BytesIO()
    stream.close()
    with pytest.raises(UnsupportedValue, match="closed"):
        round_trip([stream])


def _clock(**changed: Any) -> dict[str, Any]:
    return {"$": "datetime", "v": "2026-01-01T00:00:00", "fold": 0, "tz": None} | changed


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "Path", "v": 1},
        {"$": "Path", "v": ["a"]},
        {"$": "date", "v": "2026-13-01"},
        {"$": "date", "v": "20260101"},
        {"$": "date", "v": 20260101},
        _clock(v="2026-01-01T00:00:00Z"),
        _clock(v="2026-01-01"),
        _clock(fold=2),
        _clock(tz="UTC"),
        _clock(tz={"$": "date", "v": "2026-01-01"}),
        {"$": "datetime", "v": "2026-01-01T00:00:00"},
        {"$": "timedelta", "v": [1, 2]},
        {"$": "timedelta", "v": [0, 86400, 0]},
        {"$": "timedelta", "v": [10**12, 0, 0]},
        {"$": "timedelta", "v": [True, 0, 0]},
        {"$": "timezone", "v": [86_400_000_000, None]},
        {"$": "timezone", "v": [0]},
        {"$": "timezone", "v": [10**40, None]},
        {"$": "timezone", "v": [0, 1]},
        {"$": "BytesIO", "v": "AA==", "position": -1},
        {"$": "BytesIO", "v": "AA==", "position": 1 << 62},
        {"$": "BytesIO", "v": "AA=", "position": 0},
        {"$": "BytesIO", "v": "AA=="},
        {"$": "range", "v": [0, 1, 0]},
        {"$": "range", "v": [0, 1]},
        {"$": "range", "v": [0, 1.5, 1]},
        {"$": "slice", "v": [1, 2]},
        {"$": "numpy", "dtype": "<M8[parsec]", "v": "00" * 8},
        {"$": "numpy", "dtype": "<U1", "v": "00001100"},
        {"$": "numpy", "dtype": "S", "v": "0"},
        {"$": "numpy", "dtype": "U", "v": "ff"},
        {"$": "ndarray", "dtype": "|V4", "shape": [1], "v": "AAAAAA=="},
        {"$": "ndarray", "dtype": "<U999999999", "shape": [1 << 30], "v": "AAAA"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hostile_tree_is_damage(tree: Any) -> None:
    with pytest.raises(CheckpointDamaged):
        jsontree.decode([tree], pytest.fail)
