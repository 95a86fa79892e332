"""Blends values of several checkpoints into one, a stretch of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from asyncckpt.errors import InvalidOption

#: This many elements at a time are blended, so that they stay in the processor's cache.
_BLOCK = 1 << 18
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
    """Takes the values of one stretch of a tensor from one checkpoint after the other. ``sum``: what it adds up in, of
    the dtype that ``accumulator_of`` gives; it holds the first values already, and the blend at the end."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total = torch.view_as_real(total).reshape(-1) if total.is_complex() else total
        self._bounds: list[float] | None = None

    def add(self, values: torch.Tensor, fraction: float) -> None:
        """Go ``fraction`` of the way from the blend so far to ``values``, which are of the accumulator's dtype or of a
        narrower one. An infinity stays one, and two of different signs, or a nan, give nan."""
        if values.is_complex():
            values = torch.view_as_real(values).reshape(-1)
        blocks = range(0, self.total.numel(), _BLOCK)
        if self._bounds is None:
            self._bounds = [_bound(self.total[at : at + _BLOCK]) for at in blocks]
        for number, at in enumerate(blocks):
            so_far = self.total[at : at + _BLOCK]
            block = values[at : at + _BLOCK].to(so_far.dtype)
            bound = _bound(block)
            if bound < _SAFE and self._bounds[number] < _SAFE:
                so_far.lerp_(block, fraction)
                self._bounds[number] = max(bound, self._bounds[number])
                continue
            blended = so_far * (1 - fraction) + block * fraction
            so_far.copy_(torch.where(so_far == block, so_far, blended))
            self._bounds[number] = math.inf


def _bound(block: torch.Tensor) -> float:
    """Return the largest absolute value, infinity where one of them is nan."""
    low, high = (one.item() for one in torch.aminmax(block))
    bound = max(-low, high)
    return bound if bound == bound and low == low and high == high else math.inf
