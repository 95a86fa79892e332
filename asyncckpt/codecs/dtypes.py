"""Safetensors dtype codes for torch dtypes: the one table both directions use.

Source: the safetensors format description and ``safetensors.torch`` 0.8 (complex128 and sub-byte types have no code
that torch can hold).
"""

from __future__ import annotations

import torch

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}
DTYPES: dict[str, torch.dtype] = {code: dtype for dtype, code in CODES.items()}
ITEM_BYTES: dict[str, int] = {code: dtype.itemsize for code, dtype in DTYPES.items()}
#: Bytes of the numbers an item is made of, the ones whose planes are alike: a complex number is two floats.
PLANE_BYTES: dict[str, int] = ITEM_BYTES | {"C64": 4}
