"""These NumPy dtypes have exact bytes that mean the same on every machine: their scalars and arrays are stored."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from asyncckpt.errors import InvalidOption

if TYPE_CHECKING:
    from asyncckpt.jsontree.decode import Decoder

# long double is left out: its bytes mean different numbers on different processors
NUMPY: Final = {
    dtype.str: dtype
    for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for dtype in (np.dtype(code).newbyteorder("<"), np.dtype(code).newbyteorder(">"))
}
#: Some platforms have these as types of their own, of the same size as others.
SAME_SIZE: Final = (np.intc, np.uintc, np.longlong, np.ulonglong)
_INTS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
#: A shard can hold these NumPy dtypes, in this machine's byte order; each is mapped to torch's name for it.
AS_TENSOR: Final[dict[str, str]] = {
    np.dtype(name).str: name for name in ("bool", *_INTS, "float16", "float32", "float64", "complex64")
}
#: Text, bytes of a fixed length, and times. Their codes have a number or a unit, so no table can list them.
_WITH_PARAMETERS: Final = re.compile(r"(?:[<>]U|\|S)\d{1,9}|[<>][mM]8(?:\[\d{0,9}[a-zA-Z]{1,2}\])?")
_LAST_CODE_POINT: Final = 0x10FFFF


def dtype_of(code: Any) -> np.dtype[Any] | None:
    """Return the dtype with this code, or None where ``encode`` never writes it. Looks up nothing by name."""
    if type(code) is not str:
        return None
    known = NUMPY.get(code)
    if known is not None or not _WITH_PARAMETERS.fullmatch(code):
        return known
    try:
        found: np.dtype[Any] = np.dtype(code)
    except (TypeError, ValueError):
        return None
    return found if found.str == code else None


def problem_of(data: bytes, dtype: np.dtype[Any]) -> str | None:
    """Say why these bytes cannot be values of the dtype, or None where they can."""
    if dtype.kind == "b" and data.translate(None, b"\0\1"):
        return "a bool that is neither 0 nor 1"
    if dtype.kind == "U" and len(data) % 4 == 0:
        points = np.frombuffer(data, dtype=f"{dtype.str[0]}u4")
        if points.max(initial=0) > _LAST_CODE_POINT:
            return "text with an impossible code point"
    return None


def _dtype(decoder: Decoder, code: Any) -> np.dtype[Any]:
    dtype = dtype_of(code)
    if dtype is None:
        decoder.fail(f"the numpy dtype {code!r:.40} is unknown")
    return dtype


def _numbers(decoder: Decoder, data: bytes, dtype: np.dtype[Any], shape: list[int]) -> np.ndarray[Any, Any]:
    problem = problem_of(data, dtype)
    if problem is not None:
        decoder.fail(problem)
    try:
        return np.ndarray(shape, dtype, buffer=data).copy()
    except ValueError as error:  # numpy refuses so many dimensions, or so large ones beside a 0
        decoder.fail(f"an impossible shape ({error})")


def to_scalar(decoder: Decoder, tree: dict[str, Any]) -> Any:
    if tree["dtype"] == "U":
        return np.str_(decoder.text(tree["v"]))
    if tree["dtype"] == "S":
        return np.bytes_(decoder.hex(tree["v"]))
    dtype = _dtype(decoder, tree["dtype"])
    return _numbers(decoder, decoder.hex(tree["v"], dtype.itemsize), dtype, [1])[0]


def to_array(decoder: Decoder, tree: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype, shape, content = _dtype(decoder, tree["dtype"]), tree["shape"], tree["v"]
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        decoder.fail("a shape that is not a list of sizes")
    if type(content) is not dict:
        return _numbers(decoder, decoder.base64(content, math.prod(shape) * dtype.itemsize), dtype, shape)
    name = content.get("v")
    if content.keys() != {"$", "v"} or content["$"] != "tensor" or type(name) is not str:
        decoder.fail("an array that is neither base64 nor a tensor")
    tensor = decoder.arrays(name)
    if list(tensor.shape) != shape or str(tensor.dtype) != f"torch.{AS_TENSOR.get(dtype.str)}":
        decoder.fail(f"an array whose tensor {name!r:.80} has another shape or dtype")
    if tensor.device.type != "cpu":
        raise InvalidOption(f"{name!r} is a numpy array and was given a tensor on {tensor.device}; give one on cpu")
    return tensor.detach().numpy()
