"""Dtypes by their safetensors codes: torch's name of each and its size. Torch's own objects are in ``state/dtypes.py``.

Source: the safetensors format description and ``safetensors.torch`` 0.8 (complex128 and sub-byte types have no code
that torch can hold).
"""

from __future__ import annotations

NAMES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
}
ITEM_BYTES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
    "U64": 8,
    "U32": 4,
    "U16": 2,
}
#: Bytes of the numbers an item is made of, the ones whose planes are alike: a complex number is two floats.
PLANE_BYTES: dict[str, int] = ITEM_BYTES | {"C64": 4}
