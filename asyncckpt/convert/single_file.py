"""``export`` makes one file of a checkpoint that other tools take: plain safetensors, or a ``.pt`` for
``torch.load``."""

from __future__ import annotations

import os
from typing import Literal

import torch

from asyncckpt.convert.formats import export_checkpoint, format_of
from asyncckpt.read.opening import OpenCheckpoint

What = Literal["weights", "all"]


def export(
    checkpoint: OpenCheckpoint,
    out: str | os.PathLike[str],
    *,
    what: What | str = "weights",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> int:
    """Write an open checkpoint to ``out`` (``.safetensors`` or ``.pt``), and return the file's size in bytes.

    ``what`` is ``weights`` (the modules; names lack the component where there is one module), ``all``, or one
    component's name. ``dtype`` converts floating tensors. ``overwrite`` replaces an existing file. Every byte read is
    verified, and the file appears whole or not at all, fsynced.

    A ``.pt`` of weights or of one module is a flat ``state_dict`` that opens with ``weights_only=True``. A ``.pt`` of
    another component is its state, the optimizer's by parameter name. A ``.pt`` of ``all`` holds ``{component:
    state}``, with ``step`` and ``metrics`` beside them where no component has that name. A ``.safetensors`` holds
    tensors alone, a tied one once. ``formats.export_checkpoint`` has more formats, and says what it raises. Blocks.
    """
    return export_checkpoint(checkpoint, out, format=format_of(out), what=what, dtype=dtype, overwrite=overwrite).nbytes
