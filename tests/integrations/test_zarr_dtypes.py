"""bfloat16 and the 8-bit floats in zarr arrays: bit for bit between zarr-python and tensorstore, both ways."""

from __future__ import annotations

import importlib
import subprocess
import sys
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

from asyncckpt import MissingExtra

zarr = pytest.importorskip("zarr", minversion="3.1")
ml_dtypes = pytest.importorskip("ml_dtypes")

from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec, ZstdCodec  # noqa: E402
from zarr.dtype import data_type_registry  # noqa: E402

from asyncckpt.integrations import zarr_dtypes  # noqa: E402
from asyncckpt.integrations.zarr_dtypes import (  # noqa: E402
    BFloat16,
    DataTypeValidationError,
    Float8E5M2,
    register,
)

# signalling NaNs among the patterns, where zarr compares a chunk with its fill value
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in equal:RuntimeWarning")

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


def layout(name: str, which: str) -> dict[str, Any]:
    """Larger chunks for 65536 values, so that a test stays at a few dozen files."""
    found = dict(LAYOUTS[which])
    if name == "bfloat16":
        found["chunks"] = (found["chunks"][0] * 128, found["chunks"][1])
    return found


# -- arrays ------------------------------------------------------------------------------------------------------------


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


# -- the type and its names --------------------------------------------------------------------------------------------


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


# -- what is installed, what is registered -----------------------------------------------------------------------------


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
