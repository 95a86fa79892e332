"""Every bit pattern is a fill value that zarr-python and tensorstore read alike, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.zarr_types import (
    SPECIAL,
    TYPES,
    edit,
    every_pattern,
    exact,
    from_bits,
    metadata,
    native,
    ts_create,
    ts_read,
)
from support.zarr_types import registered as registered

zarr = pytest.importorskip("zarr", minversion="3.1")

# signalling NaNs among the patterns, where zarr compares a chunk with its fill value
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in equal:RuntimeWarning")

FILLS = [(name, bits, text) for name, cases in SPECIAL.items() for bits, text in cases.items()]


@pytest.mark.parametrize("name", TYPES)
def test_every_bit_pattern_survives_as_a_fill_value(name: str) -> None:
    data_type = TYPES[name]()
    values = every_pattern(name).reshape(-1)
    back = np.empty_like(values)
    for index, value in enumerate(values):
        text = json.dumps(data_type.to_json_scalar(value, zarr_format=3), allow_nan=False)
        back[index] = data_type.from_json_scalar(json.loads(text), zarr_format=3)
    assert exact(back) == exact(values)


@pytest.mark.parametrize(("name", "bits", "text"), FILLS)
def test_a_fill_value_means_the_same_to_zarr_and_tensorstore(
    name: str, bits: int, text: float | str, tmp_path: Path
) -> None:
    fill = from_bits(name, bits)
    for as_given, folder in ((fill[()], "scalar"), (fill, "array")):
        path = tmp_path / folder
        zarr.create_array(path, shape=(3,), dtype=name, fill_value=as_given)
        assert repr(metadata(path)["fill_value"]) == repr(text)  # repr: 0.0 == -0.0
        opened = zarr.open_array(path, mode="r")
        assert exact(opened.fill_value) == exact(fill)
        assert exact(opened[:]) == exact(np.broadcast_to(fill, 3))
        assert exact(ts_read(path)) == exact(np.broadcast_to(fill, 3))
    for number, given in enumerate((text, f"0x{bits:0{2 * fill.itemsize}x}")):
        path = tmp_path / f"tensorstore{number}"
        ts_create(path, name, [3], fill_value=given)
        assert repr(metadata(path)["fill_value"]) == repr(text)
        assert exact(zarr.open_array(path, mode="r")[:]) == exact(np.broadcast_to(fill, 3))


@pytest.mark.parametrize("name", TYPES)
def test_hex_fill_values_are_taken_for_plain_numbers_too(name: str) -> None:
    digits = 2 * native(name).itemsize
    for bits in (0x00, 0x3C, 0x80):
        for text in (f"0x{bits:0{digits}x}", f"0x{bits:0{digits}X}"):
            value = TYPES[name]().from_json_scalar(text, zarr_format=3)
            assert exact(value) == exact(from_bits(name, bits))


@pytest.mark.parametrize("name", TYPES)
def test_a_partly_written_chunk_keeps_the_fill_value_bit_for_bit(name: str, tmp_path: Path) -> None:
    for bits in SPECIAL[name]:
        fill = from_bits(name, bits)
        path = tmp_path / str(bits)
        zarr.create_array(path, shape=(6,), chunks=(4,), dtype=name, fill_value=fill)[1:3] = np.float32([1, 2])
        expected = np.broadcast_to(fill, 6).copy()
        expected[1:3] = [1, 2]
        assert exact(zarr.open_array(path, mode="r")[:]) == exact(expected)


@pytest.mark.parametrize(
    "data",
    [
        *("nan", "inf", "1.5", "", "0x", "0x7fc", "0x7fc00", "0x+7", "0x_1_", " 0x7f", "0x7fc0 ", "0xzz", "0xzzzz"),
        *(True, False, None, [], [1.0], {}, pytest.param(10**400, id="huge")),
    ],
)
@pytest.mark.parametrize("name", TYPES)
def test_a_malformed_fill_value_is_refused(name: str, data: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        TYPES[name]().from_json_scalar(data, zarr_format=3)
    zarr.create_array(tmp_path / "a", shape=(2,), dtype=name)
    edit(tmp_path / "a", fill_value=data)
    with pytest.raises(TypeError):
        zarr.open_array(tmp_path / "a", mode="r")


@pytest.mark.parametrize("name", TYPES)
def test_hex_of_another_width_is_refused(name: str) -> None:
    other = {"bfloat16": "0x7f"}.get(name, "0x7fc0")
    with pytest.raises(TypeError):
        TYPES[name]().from_json_scalar(other, zarr_format=3)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"])
@pytest.mark.parametrize("value", ["Infinity", "-Infinity", 1e6, -1e6])
def test_what_a_type_without_infinities_cannot_hold_does_not_become_nan(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match="nor an infinity"):
        TYPES[name]().from_json_scalar(value, zarr_format=3)
    with pytest.raises(TypeError, match="nor an infinity"):
        zarr.create_array({}, shape=(2,), dtype=name, fill_value=float(value))


@pytest.mark.parametrize("name", TYPES)
def test_scalars_are_checked_before_they_are_cast(name: str) -> None:
    data_type = TYPES[name]()
    for good in (1, 1.5, True, "1.5", np.float32(1.5), np.int8(1), np.array(1.5), from_bits(name, 1)):
        assert data_type._check_scalar(good)
        assert exact(data_type.cast_scalar(good)) == exact(np.asarray(good).astype("f4").astype(native(name)))
    assert exact(data_type.cast_scalar(float("nan"))) == exact(from_bits(name, next(iter(SPECIAL[name]))))
    for bad in ("one", None, object(), [1.0], np.ones(2), 1j, 10**400):
        assert not data_type._check_scalar(bad)
        with pytest.raises(TypeError):
            data_type.cast_scalar(bad)
