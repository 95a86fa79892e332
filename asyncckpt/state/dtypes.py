"""These two tables translate between torch's dtypes and the dtype codes of safetensors; both come from one."""

from __future__ import annotations

import torch

from asyncckpt.codecs.dtypes import NAMES

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in NAMES.items()}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
