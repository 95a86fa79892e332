"""Blends values of several checkpoints into one, a stretch of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from asyncckpt.errors import InvalidOption

#: This many elements at a time are blended, so that they stay in the processor's cache.
_BLOCK = 1 << 17


def fractions_of(weights: Sequence[float]) -> list[float]:
    """Return, for each value in turn, which part of the way the blend of those before it goes towards it. The first one
    is 1. A blend of equal values is that value to the bit. Raises ``InvalidOption`` for a weight that is not > 0."""
    total = 0.0
    fractions: list[float] = []
    for weight in weights:
        usable = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not usable or not 0 < weight < math.inf:
            raise InvalidOption(f"weights must be numbers > 0, not {weight!r}")
        total += weight
        fractions.append(weight / total)
    if not math.isfinite(total):
        raise InvalidOption("the weights add up to more than a number can be")
    return fractions


def ema_weights(count: int, decay: float) -> list[float]:
    """Return the weights, the oldest first, of an exponential moving average: it begins at the first value, and each
    further value moves it by ``1 - decay`` of the way. They add up to 1. Raises ``InvalidOption``."""
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 < decay < 1:
        raise InvalidOption(f"decay must be a number between 0 and 1, not {decay!r}")
    weights = [decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - i) for i in range(1, count))]
    if not all(weights):
        raise InvalidOption(f"decay={decay!r} leaves nothing of the oldest of {count} checkpoints; give fewer of them")
    return weights


def accumulator_of(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which values of ``dtype`` are added up: float32 or, for wider ones, their own. None for what
    is not averaged: whole numbers and truth values."""
    if dtype.is_complex or dtype == torch.float64:
        return dtype
    return torch.float32 if dtype.is_floating_point else None


class Blend:
    """Takes the values of one stretch of a tensor from several checkpoints, some at a time.

    ``out``: where the blend goes. ``total``: what it is added up in meanwhile, of the dtype that ``accumulator_of``
    gives: ``out`` itself, or other memory; None where all values come in one ``add``.
    """

    def __init__(self, out: torch.Tensor, total: torch.Tensor | None) -> None:
        self._out = _real(out)
        self._total = _real(total) if total is not None else None
        self._begun = False
        #: A block of the blend, of one that is added, and of what the blend was before.
        self._blocks = torch.empty(3, _BLOCK, dtype=_real(torch.empty(0, dtype=accumulator_of(out.dtype))).dtype)

    def add(self, values: Sequence[torch.Tensor], fractions: Sequence[float]) -> None:
        """Go from the blend so far to each of ``values`` in turn, by ``fractions`` of the way; the first fraction of
        all is 1. An infinity stays one, and two of different signs, or a nan, give nan."""
        rows = [_real(row) for row in values]
        begins, self._begun = not self._begun, True
        for at in range(0, self._out.numel(), _BLOCK):
            out = self._out[at : at + _BLOCK]
            own, row_block, before = self._blocks[:, : out.numel()]
            total = self._total[at : at + _BLOCK] if self._total is not None else own
            before.copy_(rows[0][at : at + _BLOCK] if begins else total)
            total.copy_(before)
            steps = [(row[at : at + _BLOCK], fraction) for row, fraction in zip(rows, fractions, strict=True)][begins:]
            for row, fraction in steps:
                total.lerp_(_as_block(row, row_block), fraction)
            if steps and not _is_finite(total):  # a difference may have been too large for a number: no longer a blend
                total.copy_(before)
                for row, fraction in steps:
                    _go(total, _as_block(row, row_block), fraction)
            if self._total is not self._out:
                out.copy_(total)


def _as_block(values: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return the values in the dtype of ``block``, which may be where they are put."""
    return values if values.dtype == block.dtype else block.copy_(values)


def _go(total: torch.Tensor, values: torch.Tensor, fraction: float) -> None:
    """Go ``fraction`` of the way to the values, which may be infinite, or as far apart as numbers can be."""
    blended = total * (1 - fraction) + values * fraction
    total.copy_(torch.where(total == values, total, blended))


def _real(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values).reshape(-1) if values.is_complex() else values


def _is_finite(block: torch.Tensor) -> bool:
    low, high = (one.item() for one in torch.aminmax(block))
    return math.isfinite(low) and math.isfinite(high)
