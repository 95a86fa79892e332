"""The tensors of a trained run are compressed in groups of one kind, as the chunks that the engine would encode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch

from asyncckpt.codecs.blosc import Array
from benchmarks.harness.trained import STEPS, trained_run

CHUNK_BYTES: Final = 8 << 20
#: The engine stores smaller tensors as they are.
MIN_TENSOR_BYTES: Final = 64 << 10
NAMES: Final = ("fp32 weights", "bf16 weights", "Adam m", "Adam v")
STAGES: Final = ("early", "mid", "late")
#: The entropy of a sample lies under that of its source: 16384 bytes of noise, the fewest here, measure 7.99 bits.
_NOISE_BITS: Final = 7.98


@dataclass(frozen=True)
class Group:
    """Holds tensors of one kind at one stage of training; each is a list of chunks of bytes."""

    name: str
    stage: str
    item_bytes: int
    tensors: Sequence[Sequence[Array]]

    @cached_property
    def chunks(self) -> list[Array]:
        return [chunk for tensor in self.tensors for chunk in tensor]

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @cached_property
    def bound(self) -> float:
        """Return the ratio if each byte plane of each tensor were coded at its order-0 entropy, and tables cost
        nothing. A coder that cuts the bits of an item elsewhere than at bytes has a bound of its own."""
        return self.nbytes / sum(_bound_bytes(tensor, self.item_bytes) for tensor in self.tensors)


def trained_groups(directory: Path) -> Iterator[Group]:
    """Yield every group at every stage of the run in ``directory``, which is trained first where it is not there."""
    run = trained_run(directory)
    for stage in STAGES:
        tensors = run.load_tensors(STEPS[stage], ["model", "optimizer"])
        weights = [tensor for name, tensor in tensors.items() if name.startswith("model.")]
        for name, chosen in (
            ("fp32 weights", weights),
            ("bf16 weights", [tensor.to(torch.bfloat16) for tensor in weights]),
            ("Adam m", [tensor for name, tensor in tensors.items() if name.endswith(".exp_avg")]),
            ("Adam v", [tensor for name, tensor in tensors.items() if name.endswith(".exp_avg_sq")]),
        ):
            yield group(name, stage, chosen)


def group(name: str, stage: str, tensors: Iterable[torch.Tensor]) -> Group:
    """Cut those of ``tensors`` that the engine would encode into chunks."""
    large = [tensor for tensor in tensors if tensor.nbytes >= MIN_TENSOR_BYTES]
    data: list[Array] = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in large]
    return Group(name, stage, large[0].element_size(), [_cut(tensor) for tensor in data])


def _cut(tensor: Array) -> list[Array]:
    return [tensor[start : start + CHUNK_BYTES] for start in range(0, tensor.nbytes, CHUNK_BYTES)]


def _bound_bytes(tensor: Sequence[Array], item_bytes: int) -> float:
    bits = 0.0
    for plane in range(item_bytes):
        counts = np.sum([np.bincount(chunk[plane::item_bytes], minlength=256) for chunk in tensor], axis=0)
        shares = counts[counts > 0] / counts.sum()
        entropy = float(-(shares * np.log2(shares)).sum())
        bits += float(counts.sum()) * (entropy if entropy < _NOISE_BITS else 8)
    return bits / 8
