"""zarr-python learns bfloat16 and the 8-bit floats here: models have these data types, and zarr 3.1 lacks them.

Names, fill values and byte order are those of the zarr-extensions registry and of tensorstore. Arrays have the numpy
dtypes of ``ml_dtypes`` and come back bit for bit, NaN payloads included. Only zarr v3 has names for these types.

zarr leaves out a chunk that ``==`` its fill value, and a chunk of nothing but -0.0 equals 0.0: pass
``config={"write_empty_chunks": True}`` where the sign of zero matters. Reading is not affected.

zarr 3.4.1 and newer import this module through its entry points, whichever array comes first, so it imports neither
torch nor anything else of this package.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, TypeGuard, cast, overload

import numpy as np


def _missing(what: str) -> ImportError:
    """Make a ``MissingExtra``; its module is imported for it alone."""
    from asyncckpt.errors import MissingExtra

    return MissingExtra(f"{what}: pip install 'asyncckpt[zarr]'")


try:
    import zarr.dtype
    import zarr.errors
    from zarr.core.dtype.common import HasEndianness, HasItemSize
    from zarr.core.dtype.npy.common import endianness_to_numpy_str, get_endianness_from_numpy_dtype
    from zarr.dtype import ZDType, data_type_registry
except ImportError as error:
    raise _missing("zarr data types need zarr 3.1 or newer") from error

if TYPE_CHECKING:
    from zarr.core.common import JSON, ZarrFormat
    from zarr.core.dtype.common import DTypeJSON

#: zarr raises this for "not this data type". The class has moved: where the new place has it, the old one warns.
DataTypeValidationError: type[ValueError] = (
    getattr(zarr.errors, "DataTypeValidationError", None) or zarr.dtype.DataTypeValidationError
)

_Native = np.dtype[np.generic]


class _DTypeClass:
    """Looks ``cls.dtype_cls``, the class of the numpy dtype, up when asked for it: ml_dtypes may not be installed."""

    def __get__(self, instance: object, owner: type[_MLFloat]) -> type[_Native]:
        return type(owner._native())


@dataclass(frozen=True, kw_only=True)
class _MLFloat(ZDType[_Native, np.generic], HasItemSize):
    """A float of ``ml_dtypes``, which names it as zarr does. A subclass adds the name, and the size where it is not one
    byte.

    Immutable and thread-safe. What needs ml_dtypes raises ``MissingExtra`` where it is not installed. Matching another
    dtype, which zarr asks every registered type to do for every array, neither needs nor imports it.
    """

    dtype_cls = cast("type[_Native]", _DTypeClass())
    _item_bytes: ClassVar[int] = 1

    @classmethod
    def _native(cls) -> _Native:
        try:
            ml_dtypes = importlib.import_module("ml_dtypes")
        except ImportError as error:
            name = cls._zarr_v3_name
            raise _missing(f"zarr data type {name!r} needs ml_dtypes") from error
        native: _Native = np.dtype(getattr(ml_dtypes, cls._zarr_v3_name))
        return native

    @property
    def item_size(self) -> int:
        """Return the bytes of one value."""
        return self._item_bytes

    # between numpy and zarr

    @classmethod
    def _check_native_dtype(cls, dtype: _Native) -> TypeGuard[_Native]:
        # nobody can hold such a dtype before ml_dtypes is imported
        return sys.modules.get("ml_dtypes") is not None and type(dtype) is cls.dtype_cls

    @classmethod
    def from_native_dtype(cls, dtype: _Native) -> Self:
        """Match the numpy dtype of this name. Raises ``DataTypeValidationError`` for any other."""
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected {cls._zarr_v3_name}")
        return cls._of(dtype)

    @classmethod
    def _of(cls, dtype: _Native) -> Self:
        return cls()

    def to_native_dtype(self) -> _Native:
        """Return the numpy dtype. Raises ``MissingExtra``."""
        return self._native()

    # between JSON and zarr

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError(f"{cls._zarr_v3_name} is no data type of zarr v2. Got {data!r}")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"Invalid JSON of {cls.__name__}. Got {data!r}, expected {cls._zarr_v3_name!r}")

    @overload
    def to_json(self, zarr_format: Literal[2]) -> NoReturn: ...

    @overload
    def to_json(self, zarr_format: Literal[3]) -> str: ...

    def to_json(self, zarr_format: ZarrFormat) -> str:
        """Return the name. Raises ``DataTypeValidationError``, a ``ValueError``, for zarr v2."""
        self._check_format(zarr_format)
        return self._zarr_v3_name

    def _check_format(self, zarr_format: ZarrFormat) -> None:
        if zarr_format != 3:
            raise DataTypeValidationError(f"{self._zarr_v3_name} is stored in zarr v3 only, not in v{zarr_format}")

    # scalars: the fill value

    def _check_scalar(self, data: object) -> bool:
        try:
            self.cast_scalar(data)
        except TypeError:
            return False
        return True

    def cast_scalar(self, data: object) -> np.generic:
        """Return ``data`` rounded to this type; a scalar of this type keeps its bits.

        Raises ``TypeError`` for what is not a number, and for a number that would become NaN: an infinity or an
        overflow where the type has no infinity.
        """
        scalar_type: Any = self.to_native_dtype().type
        if isinstance(data, np.ndarray) and data.ndim == 0:
            data = data[()]  # NaN payloads do not survive float(), so the scalar itself is taken
        if isinstance(data, scalar_type):
            return cast("np.generic", data)
        try:
            number = float(cast("Any", data))
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"Cannot convert {data!r} of {type(data)} to {self._zarr_v3_name}") from error
        scalar: np.generic = scalar_type(number)
        if math.isnan(cast("Any", scalar)) and not math.isnan(number):
            raise TypeError(f"{self._zarr_v3_name} has no value for {data!r}, nor an infinity")
        return scalar

    def default_scalar(self) -> np.generic:
        """Return 0.0, the fill value of an array that names none."""
        return self.cast_scalar(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> np.generic:
        """Return the scalar of a number, of ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, or, bit for bit, of
        ``"0x…"``.

        Raises ``TypeError`` for anything else, a wrong number of hex digits included.
        """
        self._check_format(zarr_format)
        if isinstance(data, str) and re.fullmatch(f"0x[0-9a-fA-F]{{{2 * self.item_size}}}", data):
            image = int(data, 16).to_bytes(self.item_size, sys.byteorder)
            return cast("np.generic", np.frombuffer(image, self._native())[0])
        # to Python a bool is an int, to JSON it is not a number
        if data in ("NaN", "Infinity", "-Infinity") or type(data) in (int, float):
            return self.cast_scalar(data)
        raise TypeError(f"Invalid fill value of {self._zarr_v3_name}: {data!r}")

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> float | str:
        """Invert ``from_json_scalar``; every NaN that is not the type's ``"NaN"`` becomes hex."""
        self._check_format(zarr_format)
        scalar = self.cast_scalar(data)
        number = float(cast("Any", scalar))
        if math.isinf(number):
            return "Infinity" if number > 0 else "-Infinity"
        if not math.isnan(number):
            return number
        image = scalar.tobytes()
        if image == self.cast_scalar(math.nan).tobytes():
            return "NaN"
        return f"0x{int.from_bytes(image, sys.byteorder):0{2 * self.item_size}x}"


@dataclass(frozen=True, kw_only=True)
class BFloat16(_MLFloat, HasEndianness):
    """``bfloat16`` has 1 sign, 8 exponent and 7 mantissa bits. The ``bytes`` codec holds the byte order of a file."""

    _zarr_v3_name = "bfloat16"
    _item_bytes = 2

    @classmethod
    def _of(cls, dtype: _Native) -> Self:
        return cls(endianness=get_endianness_from_numpy_dtype(dtype))

    def to_native_dtype(self) -> _Native:
        """Return the numpy dtype in this byte order. Raises ``MissingExtra``."""
        if self.endianness == sys.byteorder:
            # numpy marks a dtype of ml_dtypes "<" where it was asked for "<", and its own "=": it must be the usual one
            return self._native()
        return self._native().newbyteorder(endianness_to_numpy_str(self.endianness))


class Float8E4M3FN(_MLFloat):
    """``float8_e4m3fn`` reaches 448 and has no infinities; 0x7f and 0xff are NaN."""

    _zarr_v3_name = "float8_e4m3fn"


class Float8E5M2(_MLFloat):
    """``float8_e5m2`` reaches 57344 and has infinities and NaNs as in IEEE 754."""

    _zarr_v3_name = "float8_e5m2"


class Float8E4M3FNUZ(_MLFloat):
    """``float8_e4m3fnuz`` reaches 240 and has no infinities and one NaN, 0x80, so it has no -0.0."""

    _zarr_v3_name = "float8_e4m3fnuz"


class Float8E5M2FNUZ(_MLFloat):
    """``float8_e5m2fnuz`` reaches 57344 and has no infinities and one NaN, 0x80, so it has no -0.0."""

    _zarr_v3_name = "float8_e5m2fnuz"


def register() -> None:
    """Make the five names known to zarr-python in this process; a name that is already taken stays as it is.

    zarr 3.4.1 and newer do so by themselves, through the entry points of the group ``zarr.data_type``; older versions
    collect that group and never load it. Idempotent. Other threads may open and create arrays meanwhile.
    """
    known = data_type_registry.contents
    ours = {one._zarr_v3_name: one for one in (BFloat16, Float8E4M3FN, Float8E5M2, Float8E4M3FNUZ, Float8E5M2FNUZ)}
    if not ours.keys() <= known.keys():
        # a new dict, because zarr iterates over this one without a lock; the registry is a frozen dataclass
        object.__setattr__(data_type_registry, "contents", {**ours, **known})
