"""Measures how far weights have drifted: by length and by direction, of each tensor and of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: This many elements at a time are widened to float64.
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the elements that are finite in both of two tensors: of the squares of the first, of the second, and of
    their difference, and of their products."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    product: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.first + other.first,
            self.second + other.second,
            self.difference + other.difference,
            self.product + other.product,
        )

    @property
    def drift(self) -> float | None:
        """‖B-A‖ / ‖A‖; None where A is zero, or the numbers are too large."""
        return _number(self.difference and math.sqrt(self.difference), math.sqrt(self.first))

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between A and B, from -1 to 1; None where one is zero, or they are too large."""
        found = _number(self.product, math.sqrt(self.first) * math.sqrt(self.second))
        return None if found is None else max(-1.0, min(1.0, found))


def _number(above: float, below: float) -> float | None:
    return above / below if below and math.isfinite(above) and math.isfinite(below) else None


def moments_of(a: torch.Tensor, b: torch.Tensor) -> Moments | None:
    """Measure two tensors of one shape and dtype in float64; None for what is not floating or complex."""
    import torch

    if not (a.is_floating_point() or a.is_complex()):
        return None
    total = Moments()
    for begin in range(0, a.numel(), _CHUNK):
        x, y = (_wide(tensor.reshape(-1)[begin : begin + _CHUNK]) for tensor in (a, b))
        finite = x.isfinite() & y.isfinite()
        if not bool(finite.all()):
            x, y = torch.where(finite, x, 0.0), torch.where(finite, y, 0.0)
        delta = y - x
        total += Moments(*(torch.dot(p, q).item() for p, q in ((x, x), (y, y), (delta, delta), (x, y))))
    return total


def _wide(values: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.view_as_real(values).reshape(-1).double() if values.is_complex() else values.double()


def layer_of(name: str) -> str:
    """Return the layer that a tensor is in: its name up to the first number (``model.h.3``), or, without one, up to the
    last dot (``model.wte``)."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1] or parts)


def by_layer(moments: Mapping[str, Moments], changed: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return drift and cosine of each layer, in the order of its first tensor, with how many tensors it has and how
    many of them have changed."""
    moved = set(changed)
    groups: dict[str, list[str]] = {}
    for name in moments:
        groups.setdefault(layer_of(name), []).append(name)
    return {
        layer: {
            "drift": (total := sum((moments[name] for name in names), Moments())).drift,
            "cosine": total.cosine,
            "tensors": len(names),
            "changed": sum(name in moved for name in names),
        }
        for layer, names in groups.items()
    }
