"""The measurements become bars here: a figure, what it ought to be, what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.suites.codecs.contenders import OURS
from benchmarks.suites.codecs.groups import NAMES
from benchmarks.suites.codecs.measure import SCALED, GroupResult, Measured, Results
from benchmarks.suites.codecs.whole_saves import Row

RATIOS: Final[Mapping[str, float]] = {
    "bf16 weights": 1.47,
    "fp32 weights": 1.19,
    "Adam m": 1.19,
    "Adam v": 1.25,
}
_ENCODE: Final = 1.0e9
_DECODE: Final = 2.0e9
_SCALING: Final = 1.8
#: Ratios this close count as equal; among those, speed decides.
_ALIKE: Final = 0.98
_FASTER: Final = 2.0


def rows(results: Results) -> list[Row]:
    """Return the bars of chunks."""
    late = {name: results.of(name, "late") for name in NAMES}
    weights = late[SCALED[0]].of(OURS)
    found = [_ratio(late[name], bar) for name, bar in RATIOS.items()]
    found.append(
        Row(
            f"{OURS} encodes, {SCALED[0]}, one core",
            f">= {_ENCODE / 1e9:.1f} GB/s",
            f"{weights.encode.text(2, 1e-9)} GB/s",
            weights.encode.median >= _ENCODE,
        )
    )
    if results.scaling is not None:
        scaling = results.scaling
        found.append(
            Row(
                f"{OURS} encodes, {SCALED[0]}, two threads / one",
                f">= {_SCALING:.1f} x",
                f"{scaling.ratio.text(2)} x, {scaling.two.median / 1e9:.2f} GB/s; "
                f"SHA-256 here: {scaling.ceiling.median:.2f} x",
                scaling.ratio.median >= _SCALING,
            )
        )
    found.append(
        Row(
            f"{OURS} decodes, {SCALED[0]}, one core",
            f">= {_DECODE / 1e9:.1f} GB/s",
            f"{weights.decode.text(2, 1e-9)} GB/s",
            weights.decode.median >= _DECODE,
        )
    )
    return found + [_standing(late[name]) for name in NAMES]


def standing(measured: Sequence[Measured]) -> tuple[bool, str]:
    """Say whether ``planes`` has the best ratio, at twice the speed of everyone within 2 % of its own, and who wins:
    the fastest of those within 2 % of the best ratio."""
    ours = next(found for found in measured if found.label == OURS)
    best = max(measured, key=lambda found: found.ratio)
    winner = max((f for f in measured if f.ratio >= _ALIKE * best.ratio), key=lambda found: found.encode.median)
    near = [found for found in measured if found.label != OURS and found.ratio >= _ALIKE * ours.ratio]
    parts = [f"{winner.label} is the fastest within 2 % of the best ratio, {best.ratio:.3f}"]
    if best.label != OURS:
        parts[0] += f" of {best.label}"
        parts.append(f"{OURS} {ours.ratio:.3f}")
    speed = math.inf
    if near:
        rival = max(near, key=lambda found: found.encode.median)
        speed = ours.encode.median / rival.encode.median
        parts.append(f"{speed:.2f} x the speed of {rival.label}")
    return speed >= _FASTER and best.ratio == ours.ratio, "; ".join(parts)


def _ratio(group: GroupResult, bar: float) -> Row:
    ratio = group.of(OURS).ratio
    text = f"{ratio:.3f}; order-0 bound {group.bound:.3f}"
    return Row(f"{OURS}, ratio, {group.name}", f">= {bar:.2f}", text, ratio >= bar)


def _standing(group: GroupResult) -> Row:
    met, text = standing(group.measured)
    return Row(f"{OURS} among all, {group.name}", f"best ratio, >= {_FASTER:g} x any within 2 %", text, met)
