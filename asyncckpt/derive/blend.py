"""Blends values of several checkpoints into one, a stretch of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from asyncckpt.errors import InvalidOption

#: This many elements at a time are blended, so that they stay in the processor's cache.
_BLOCK = 1 << 17
#: Differences of smaller numbers stay finite in float32, whatever their signs are.
_SAFE = 1e38


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
        self._bounds: list[float] = []
        self._block = torch.empty(_BLOCK, dtype=_real(torch.empty(0, dtype=accumulator_of(out.dtype))).dtype)

    def add(self, values: Sequence[torch.Tensor], fractions: Sequence[float]) -> None:
        """Go from the blend so far to each of ``values`` in turn, by ``fractions`` of the way; the first fraction of
        all is 1. An infinity stays one, and two of different signs, or a nan, give nan."""
        rows = [_real(row) for row in values]
        begins = not self._bounds
        for number, at in enumerate(range(0, self._out.numel(), _BLOCK)):
            out = self._out[at : at + _BLOCK]
            total = self._total[at : at + _BLOCK] if self._total is not None else torch.empty_like(self._block)
            total = total[: out.numel()]
            if begins:
                total.copy_(rows[0][at : at + _BLOCK])
                self._bounds.append(_bound(total))
            bound = self._bounds[number]
            for row, fraction in zip(rows[begins:], fractions[begins:], strict=True):
                bound = self._go(total, row[at : at + _BLOCK], fraction, bound)
            self._bounds[number] = bound
            if self._total is not self._out:
                out.copy_(total)

    def _go(self, total: torch.Tensor, values: torch.Tensor, fraction: float, bound: float) -> float:
        """Go ``fraction`` of the way to one block of values. ``bound``: the largest absolute value so far; returns that
        of both."""
        block = values
        if values.dtype != total.dtype:
            block = self._block[: values.numel()]
            block.copy_(values)
        own = _bound(block)
        if own < _SAFE and bound < _SAFE:
            total.lerp_(block, fraction)
            return max(own, bound)
        blended = total * (1 - fraction) + block * fraction
        total.copy_(torch.where(total == block, total, blended))
        return math.inf


def _real(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values).reshape(-1) if values.is_complex() else values


def _bound(block: torch.Tensor) -> float:
    """Return the largest absolute value, infinity where one of them is nan."""
    low, high = (one.item() for one in torch.aminmax(block))
    bound = max(-low, high)
    return bound if bound == bound and low == low and high == high else math.inf
