"""A window is a stretch of training with a save in it, or without one: what it takes beyond quiet iterations is the
drag.

A mean lies above a median, and clocks drift, so that a window without a save has some drag, too. It is measured in the
same way, and shown beside the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

#: So many iterations without a save before a window, and after it.
QUIET = 8
#: The drain of 9 GB takes two iterations. What is counted in the first ones is next to nothing but the drain's.
FIRST = 8
#: The last iterations before a save is durable are those beside its commit.
LAST = 2


@dataclass(frozen=True, slots=True)
class Window:
    """``stall_seconds``: how long ``save`` took to return. ``iterations``: the seconds of all that came then, until the
    save was durable. ``baseline_seconds``: of a quiet one, the mean of the medians before and after.
    ``durable_seconds`` is counted from the call of ``save``."""

    stall_seconds: float
    iterations: tuple[float, ...]
    baseline_seconds: float
    durable_seconds: float

    def drag_seconds(self, first: int | None = None) -> float:
        """Return how much longer the save and the iterations took than without it; of the first ones alone, where
        ``first`` is given."""
        counted = self.iterations[:first]
        return self.stall_seconds + sum(counted) - len(counted) * self.baseline_seconds

    def commit_seconds(self) -> float:
        """Return how much longer the last iterations took than quiet ones."""
        counted = self.iterations[-LAST:]
        return sum(counted) - len(counted) * self.baseline_seconds

    def worst_seconds(self) -> float:
        """Return the longest iteration; the save counts to the first one."""
        first, *others = self.iterations
        return max([self.stall_seconds + first, *others])


def measure(
    iterate: Callable[[], object], save: Callable[[], Callable[[], bool]] | None, *, least: int, quiet: int = QUIET
) -> Window:
    """Train through one window, of at least ``least`` iterations. ``save`` begins a save and returns what tells whether
    it is durable; without it the window has ``least`` iterations. Blocks."""

    def timed() -> float:
        began = time.perf_counter()
        iterate()
        return time.perf_counter() - began

    before = [timed() for _ in range(quiet)]
    began = time.perf_counter()
    durable = save() if save is not None else lambda: True
    stall = time.perf_counter() - began
    iterations: list[float] = []
    durable_seconds = 0.0
    while len(iterations) < least or not durable_seconds:
        iterations.append(timed())
        if not durable_seconds and durable():
            durable_seconds = time.perf_counter() - began
    after = [timed() for _ in range(quiet)]
    baseline = (statistics.median(before) + statistics.median(after)) / 2
    return Window(stall if save is not None else 0.0, tuple(iterations), baseline, durable_seconds)
