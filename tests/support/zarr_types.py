"""The data types that zarr does not have: their bit patterns, and arrays of them in zarr-python and tensorstore."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

zarr = pytest.importorskip("zarr", minversion="3.1")
ml_dtypes = pytest.importorskip("ml_dtypes")

from zarr.dtype import data_type_registry  # noqa: E402

from asyncckpt.integrations.zarr_dtypes import (  # noqa: E402
    BFloat16,
    Float8E4M3FN,
    Float8E4M3FNUZ,
    Float8E5M2,
    Float8E5M2FNUZ,
    register,
)

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
