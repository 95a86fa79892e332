"""What tests of the zarr format share: the manifest and other content of the same shape."""

from __future__ import annotations

from pathlib import Path

import torch

from asyncckpt import Run
from asyncckpt.manifest.records import Manifest


def to_fill(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}


def manifest_of(path: Path, step: int = 1) -> Manifest:
    with Run(path).open(step) as checkpoint:
        return checkpoint.manifest
