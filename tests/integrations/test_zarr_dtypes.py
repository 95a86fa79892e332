"""bfloat16 and the 8-bit floats in zarr arrays: bit for bit between zarr-python and tensorstore, both ways."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncckpt import MissingExtra

zarr = pytest.importorskip("zarr", minversion="3.1")
ml_dtypes = pytest.importorskip("ml_dtypes")

from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec, ZstdCodec  # noqa: E402
from zarr.dtype import data_type_registry  # noqa: E402

from asyncckpt.integrations import zarr_dtypes  # noqa: E402
from asyncckpt.integrations.zarr_dtypes import (  # noqa: E402
    BFloat16,
    DataTypeValidationError,
    Float8E4M3FN,
    Float8E4M3FNUZ,
    Float8E5M2,
    Float8E5M2FNUZ,
    register,
)

# signalling NaNs among the patterns, where zarr compares a chunk with its fill value
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in equal:RuntimeWarning")

TYPES = {
    "bfloat16": BFloat16,
    "float8_e4m3fn": Float8E4M3FN,
    "float8_e5m2": Float8E5M2,
    "float8_e4m3fnuz": Float8E4M3FNUZ,
    "float8_e5m2fnuz": Float8E5M2FNUZ,
}
#: Bit patterns that are easily lost, with their JSON in zarr.json; the first is what "NaN" stands for.
SPECIAL: dict[str, dict[int, float | str]] = {
    "bfloat16": {
        0x7FC0: "NaN",
        0xFFC0: "0xffc0",
        0x7FC1: "0x7fc1",
        0x7F81: "0x7f81",
        0x7F80: "Infinity",
        0xFF80: "-Infinity",
        0x8000: -0.0,
        0x0001: 2.0**-133,
        0x3FC0: 1.5,
    },
    "float8_e4m3fn": {0x7F: "NaN", 0xFF: "0xff", 0x80: -0.0, 0x01: 2.0**-9, 0x3C: 1.5, 0x7E: 448.0},
    "float8_e5m2": {
        0x7E: "NaN",
        0xFE: "0xfe",
        0x7D: "0x7d",
        0x7F: "0x7f",
        0x7C: "Infinity",
        0xFC: "-Infinity",
        0x80: -0.0,
        0x01: 2.0**-16,
        0x3E: 1.5,
    },
    "float8_e4m3fnuz": {0x80: "NaN", 0x01: 2.0**-10, 0x44: 1.5, 0xFF: -240.0},
    "float8_e5m2fnuz": {0x80: "NaN", 0x01: 2.0**-17, 0x42: 1.5, 0xFF: -57344.0},
}
FILLS = [(name, bits, text) for name, cases in SPECIAL.items() for bits, text in cases.items()]

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"chunks": (8, 4), "compressors": None},
    "zstd": {"chunks": (8, 4), "compressors": ZstdCodec(level=1)},
    "blosc": {"chunks": (8, 4), "compressors": BloscCodec(cname="lz4", shuffle="bitshuffle")},
    "sharded zstd": {
        "chunks": (8, 8),
        "serializer": ShardingCodec(chunk_shape=(4, 8), codecs=[BytesCodec(), ZstdCodec()]),
        "compressors": None,
    },
    "sharded blosc": {
        "chunks": (8, 8),
        "serializer": ShardingCodec(chunk_shape=(4, 8), codecs=[BytesCodec(), BloscCodec(shuffle="shuffle")]),
        "compressors": None,
    },
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The names are known during a test and, unless something else made them so, not after it."""
    before = dict(data_type_registry.contents)
    register()
    yield
    data_type_registry.contents.clear()
    data_type_registry.contents.update(before)


def native(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name))


def from_bits(name: str, bits: Any) -> np.ndarray[Any, Any]:
    """An array, 0-d for an int, with these bit patterns."""
    return np.asarray(bits, f"u{native(name).itemsize}").view(native(name))


def every_pattern(name: str) -> np.ndarray[Any, Any]:
    """All 256 or 65536 bit patterns, 16 in a row."""
    return from_bits(name, np.arange(256 ** native(name).itemsize)).reshape(-1, 16)


def layout(name: str, which: str) -> dict[str, Any]:
    """Larger chunks for 65536 values, so that a test stays at a few dozen files."""
    found = dict(LAYOUTS[which])
    if name == "bfloat16":
        found["chunks"] = (found["chunks"][0] * 128, found["chunks"][1])
    return found


def exact(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """What has to be equal: the dtype with its byte order, the shape, every bit."""
    array = np.asarray(value)
    return (f"{array.dtype.name} {array.dtype.byteorder}", array.shape, array.tobytes())


def ts_read(path: Path) -> Any:
    ts = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return ts.open(spec, open=True, read=True).result().read().result()


def ts_create(path: Path, name: str, shape: list[int], **metadata: Any) -> Any:
    ts = pytest.importorskip("tensorstore")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {"data_type": name, "shape": shape, **metadata},
    }
    return ts.open(spec, create=True).result()


def metadata(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text())
    return found


def edit(path: Path, **changes: Any) -> None:
    (path / "zarr.json").write_text(json.dumps({**metadata(path), **changes}))


# arrays


@pytest.mark.parametrize("which", LAYOUTS)
@pytest.mark.parametrize("name", TYPES)
def test_every_bit_pattern_written_by_zarr_is_read_by_zarr_and_tensorstore(
    name: str, which: str, tmp_path: Path
) -> None:
    values = every_pattern(name)
    array = zarr.create_array(tmp_path / "a", shape=values.shape, dtype=values.dtype, **layout(name, which))
    array[:] = values
    assert metadata(tmp_path / "a")["data_type"] == name
    opened = zarr.open_array(tmp_path / "a", mode="r")
    assert opened.dtype == native(name)
    assert exact(opened[:]) == exact(values)
    assert exact(opened[3:9, 2:7]) == exact(values[3:9, 2:7])
    assert exact(ts_read(tmp_path / "a")) == exact(values)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_every_bit_pattern_written_by_tensorstore_is_read_by_zarr(name: str, sharded: bool, tmp_path: Path) -> None:
    values = every_pattern(name)
    inner: list[dict[str, Any]] = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}]
    if name == "bfloat16":
        inner[0] = {"name": "bytes", "configuration": {"endian": "little"}}
    rows = len(values) // 4
    shards = {"name": "sharding_indexed", "configuration": {"chunk_shape": [rows // 2, 16], "codecs": inner}}
    store = ts_create(
        tmp_path / "a",
        name,
        list(values.shape),
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [rows, 16]}},
        codecs=[shards] if sharded else inner,
    )
    store.write(values).result()
    assert exact(zarr.open_array(tmp_path / "a", mode="r")[:]) == exact(values)


@pytest.mark.parametrize("order", ["little", "big"])
def test_the_bytes_codec_decides_the_byte_order_of_bfloat16_files(order: str, tmp_path: Path) -> None:
    values = every_pattern("bfloat16").reshape(-1)
    where = {"chunks": values.shape, "serializer": BytesCodec(endian=order), "compressors": None}
    zarr.create_array(tmp_path / "a", shape=values.shape, dtype="bfloat16", **where)[:] = values
    assert metadata(tmp_path / "a")["codecs"] == [{"name": "bytes", "configuration": {"endian": order}}]
    stored = (tmp_path / "a" / "c" / "0").read_bytes()
    assert stored == np.arange(65536, dtype={"little": "<u2", "big": ">u2"}[order]).tobytes()
    assert exact(zarr.open_array(tmp_path / "a", mode="r")[:]) == exact(values)
    assert exact(ts_read(tmp_path / "a")) == exact(values)


def test_a_big_endian_numpy_array_keeps_its_values(tmp_path: Path) -> None:
    values = every_pattern("bfloat16").reshape(-1)
    big = values.astype(values.dtype.newbyteorder(">"))
    array = zarr.create_array(tmp_path / "a", shape=big.shape, chunks=big.shape, dtype=big.dtype)
    assert array.metadata.data_type == BFloat16(endianness="big")
    array[:] = big
    assert exact(zarr.open_array(tmp_path / "a", mode="r")[:]) == exact(values)
    assert exact(ts_read(tmp_path / "a")) == exact(values)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "bfloat16"])
def test_single_bytes_are_stored_without_a_byte_order(name: str, tmp_path: Path) -> None:
    values = every_pattern(name).reshape(-1)
    where = {"chunks": values.shape, "compressors": None}
    zarr.create_array(tmp_path / "a", shape=values.shape, dtype=values.dtype, **where)[:] = values
    assert metadata(tmp_path / "a")["codecs"] == [{"name": "bytes"}]
    assert (tmp_path / "a" / "c" / "0").read_bytes() == bytes(range(256))


@pytest.mark.parametrize("name", TYPES)
def test_arrays_without_dimensions_and_without_values(name: str, tmp_path: Path) -> None:
    scalar = from_bits(name, next(iter(SPECIAL[name])))
    zarr.create_array(tmp_path / "scalar", shape=(), dtype=scalar.dtype)[()] = scalar
    assert exact(zarr.open_array(tmp_path / "scalar", mode="r")[()]) == exact(scalar)
    assert exact(ts_read(tmp_path / "scalar")) == exact(scalar)
    zarr.create_array(tmp_path / "empty", shape=(0, 3), chunks=(1, 3), dtype=scalar.dtype)[:] = np.empty(
        (0, 3), scalar.dtype
    )
    empty = zarr.open_array(tmp_path / "empty", mode="r")[:]
    assert exact(empty) == exact(np.empty((0, 3), native(name)))
    assert exact(ts_read(tmp_path / "empty")) == exact(empty)


@pytest.mark.parametrize("name", TYPES)
def test_chunks_of_zeros_of_either_sign_survive_where_empty_chunks_are_written(name: str, tmp_path: Path) -> None:
    values = from_bits(name, [0x80 << 8 * (native(name).itemsize - 1)] * 4 + [0] * 4)
    array = zarr.create_array(
        tmp_path / "a", shape=(8,), chunks=(4,), dtype=values.dtype, config={"write_empty_chunks": True}
    )
    array[:] = values
    assert exact(zarr.open_array(tmp_path / "a", mode="r")[:]) == exact(values)
    assert exact(ts_read(tmp_path / "a")) == exact(values)


@pytest.mark.parametrize("name", TYPES)
def test_numbers_and_other_floats_are_rounded_as_ml_dtypes_does(name: str, tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(4,), chunks=(4,), dtype=name)
    array[:] = np.array([0.1, -3.3, 7.7, 0.0], "f4")
    array[3] = 1.7
    expected = np.array([0.1, -3.3, 7.7, 1.7], "f4").astype(native(name))
    assert exact(zarr.open_array(tmp_path / "a", mode="r")[:]) == exact(expected)


# the type and its names


@pytest.mark.parametrize("name", TYPES)
def test_a_dtype_is_found_by_name_by_scalar_type_and_by_numpy_dtype(name: str) -> None:
    for asked in (name, getattr(ml_dtypes, name), native(name), TYPES[name]()):
        array = zarr.create_array({}, shape=(2,), dtype=asked)
        assert array.metadata.data_type == TYPES[name]()
        assert type(array.metadata.data_type) is TYPES[name]
        assert array.dtype == native(name)


@pytest.mark.parametrize("asked", ["f2", "f4", "i1", "u1", "i2", "u2", "V1", "V2", "S2", "bool", [("x", "u2")]])
def test_other_numpy_dtypes_are_left_to_their_own_types(asked: Any) -> None:
    assert data_type_registry.match_dtype(np.dtype(asked)).__class__.__module__.startswith("zarr.")
    for data_type in TYPES.values():
        with pytest.raises(DataTypeValidationError):
            data_type.from_native_dtype(np.dtype(asked))


@pytest.mark.parametrize("name", TYPES)
def test_a_type_knows_its_size_its_numpy_class_and_its_equals(name: str) -> None:
    data_type = TYPES[name]()
    assert data_type.item_size == native(name).itemsize
    assert data_type.dtype_cls is type(native(name))
    assert data_type.to_native_dtype() == native(name)
    assert data_type.to_json(zarr_format=3) == name
    assert data_type.from_json(name, zarr_format=3) == data_type
    assert hash(data_type.from_json(name, zarr_format=3)) == hash(data_type)
    assert [other for other, cls in TYPES.items() if cls() == data_type] == [name]
    assert exact(data_type.default_scalar()) == exact(from_bits(name, 0))


def test_byte_orders_of_bfloat16_are_different_types() -> None:
    little, big = BFloat16(endianness="little"), BFloat16(endianness="big")
    assert little != big
    assert big.to_native_dtype() == native("bfloat16").newbyteorder(">")
    assert [BFloat16.from_native_dtype(each.to_native_dtype()) for each in (little, big)] == [little, big]


@pytest.mark.parametrize(
    "data",
    [
        *("", "bfloat", "BFloat16", "float8", "float8_e4m3", 16, None, ["bfloat16"], {"name": "bfloat16"}),
        *({"name": name, "configuration": {}} for name in TYPES),
    ],
)
def test_json_of_no_known_dtype_is_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No Zarr data type found"):
        data_type_registry.match_json(data, zarr_format=3)
    for data_type in TYPES.values():
        with pytest.raises(DataTypeValidationError):
            data_type.from_json(data, zarr_format=3)
    zarr.create_array(tmp_path / "a", shape=(2,), dtype="bfloat16")
    edit(tmp_path / "a", data_type=data)
    with pytest.raises(ValueError, match=r"No Zarr data type found|Invalid data_type"):
        zarr.open_array(tmp_path / "a", mode="r")


@pytest.mark.parametrize("name", TYPES)
def test_zarr_v2_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataTypeValidationError, match="v3 only"):
        zarr.create_array(tmp_path / "a", shape=(2,), dtype=native(name), zarr_format=2)
    assert not list(tmp_path.rglob(".z*"))
    data_type = TYPES[name]()
    with pytest.raises(DataTypeValidationError):
        data_type.from_json({"name": name, "object_codec_id": None}, zarr_format=2)
    with pytest.raises(DataTypeValidationError):
        data_type.from_json_scalar(0.0, zarr_format=2)
    with pytest.raises(DataTypeValidationError):
        data_type.to_json_scalar(0.0, zarr_format=2)


# fill values


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


# what is installed, what is registered


def test_without_ml_dtypes_other_arrays_work_and_these_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TYPES:
        zarr.create_array(tmp_path / name, shape=(2,), dtype=name)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    zarr.create_array(tmp_path / "plain", shape=(2,), dtype="f4")[:] = 1
    assert zarr.open_array(tmp_path / "plain", mode="r")[:].tolist() == [1, 1]
    for name in TYPES:
        with pytest.raises(MissingExtra, match=rf"{name}.*pip install 'asyncckpt\[zarr\]'"):
            zarr.open_array(tmp_path / name, mode="r")
        with pytest.raises(MissingExtra):
            zarr.create_array(tmp_path / "new", shape=(2,), dtype=TYPES[name]())


def test_without_zarr_the_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, zarr_dtypes.__name__)
    for name in [name for name in sys.modules if name.partition(".")[0] == "zarr"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"pip install 'asyncckpt\[zarr\]'"):
        importlib.import_module(zarr_dtypes.__name__)


def test_registering_leaves_ml_dtypes_unimported_until_an_array_needs_it() -> None:
    script = (
        "import sys, zarr; from asyncckpt.integrations.zarr_dtypes import register; register()\n"
        "zarr.create_array({}, shape=(2,), dtype='f4'); assert 'ml_dtypes' not in sys.modules\n"
        "print(zarr.create_array({}, shape=(2,), dtype='bfloat16').dtype)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "bfloat16\n"), done.stderr


def test_registering_twice_changes_nothing_and_a_taken_name_stays() -> None:
    class Other(Float8E5M2):
        pass

    before = dict(data_type_registry.contents)
    register()
    assert data_type_registry.contents == before
    data_type_registry.register("float8_e5m2", Other)
    register()
    assert data_type_registry.contents == {**before, "float8_e5m2": Other}
