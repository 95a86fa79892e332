"""Torch dtypes ↔ safetensors dtype codes: the one table both directions use."""

from __future__ import annotations

import torch

from asyncckpt.codecs.dtypes import NAMES

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in NAMES.items()}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
