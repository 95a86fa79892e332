"""Cadences say when a save is due. Their answers depend on the step, the clock and the last save alone.

They look at what lies between the last save and now, so a loop that calls ``step`` only now and then, or whose save was
skipped, saves at its next call instead of missing the mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from asyncckpt.errors import InvalidOption


@runtime_checkable
class Cadence(Protocol):
    """Says when a save is due. An implementation must be pure; the clock is passed in."""

    def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
        """Whether to save after ``step``. Seconds are those of a monotonic clock. ``last_saved_step`` is the newest
        step saved or resumed from, or None; ``last_saved_seconds`` is the time of that save, or of the run's beginning.
        Called on the training thread; must not block."""
        ...


#: ``every`` is nothing, a number of steps, a cadence, or several of those.
Every: TypeAlias = "int | Cadence | Sequence[int | Cadence] | None"


class _Combinable:
    __slots__ = ()

    def __or__(self: Cadence, other: Cadence) -> AnyOf:
        return AnyOf(self, other) if _is_cadence(other) else NotImplemented


@dataclass(frozen=True, slots=True)
class Steps(_Combinable):
    """A save is due at every multiple of ``n`` steps, or as soon as one was passed since the last save. Raises
    ``InvalidOption`` unless ``n`` is a whole number from 1."""

    n: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise InvalidOption(f"Steps: n must be a whole number >= 1, not {self.n!r}")

    def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
        if last_saved_step is not None and step < last_saved_step:
            # the loop went back without restoring: the save must happen and fail loudly, rather than silently not
            # happen
            return step % self.n == 0
        return step // self.n > (last_saved_step or 0) // self.n


@dataclass(frozen=True, slots=True)
class Minutes(_Combinable):
    """A save is due when ``m`` minutes have passed since the last one began. Raises ``InvalidOption`` unless ``m`` is a
    finite number above 0."""

    m: float

    def __post_init__(self) -> None:
        if type(self.m) not in (int, float) or not 0 < self.m < math.inf:
            raise InvalidOption(f"Minutes: m must be a number > 0, not {self.m!r}")

    def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
        return step != last_saved_step and now_seconds - last_saved_seconds >= self.m * 60


@dataclass(frozen=True, slots=True)
class Milestones(_Combinable):
    """A save is due at each of these steps, or as soon as one was passed since the last save. Raises ``InvalidOption``
    unless all are whole numbers from 0."""

    steps: Iterable[int]

    def __post_init__(self) -> None:
        steps = self.steps
        chosen = None if isinstance(steps, str | bytes) or not isinstance(steps, Iterable) else tuple(steps)
        if not chosen or not all(type(step) is int and step >= 0 for step in chosen):
            raise InvalidOption(f"Milestones: steps must be one or more whole numbers >= 0, not {steps!r}")
        object.__setattr__(self, "steps", tuple(sorted(set(chosen))))

    def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
        if last_saved_step is not None and step < last_saved_step:
            return step in self.steps
        last = -1 if last_saved_step is None else last_saved_step
        return any(last < milestone <= step for milestone in self.steps)


@dataclass(frozen=True, slots=True, init=False)
class AnyOf(_Combinable):
    """A save is due when any of these cadences says so. ``Steps(100) | Minutes(10)`` is the same."""

    cadences: tuple[Cadence, ...]

    def __init__(self, *cadences: Cadence) -> None:
        if not cadences:
            raise InvalidOption("AnyOf takes at least one cadence")
        flat: list[Cadence] = []
        for cadence in cadences:
            if not _is_cadence(cadence):
                raise InvalidOption(f"AnyOf takes cadences such as Steps(100), not {cadence!r}")
            flat += cadence.cadences if isinstance(cadence, AnyOf) else (cadence,)
        object.__setattr__(self, "cadences", tuple(flat))

    def __repr__(self) -> str:
        return f"AnyOf({', '.join(map(repr, self.cadences))})"

    def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
        return any(one.due(step, now_seconds, last_saved_step, last_saved_seconds) for one in self.cadences)


@dataclass(frozen=True, slots=True)
class Never(_Combinable):
    """No save is ever due; only explicit ones happen."""

    def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
        return False


def parse(every: Every) -> Cadence:
    """Return the cadence that ``every`` means: None is never, an int is that many steps, several are whichever comes
    first.

    Raises ``InvalidOption`` for anything else.
    """
    if every is None:
        return Never()
    if type(every) is int:
        return Steps(every)
    if isinstance(every, list | tuple) and every and None not in every:
        return AnyOf(*(parse(one) for one in every))
    if _is_cadence(every):
        return every
    raise InvalidOption(
        f"every must be None, a number of steps, a cadence such as Minutes(10), or these in a list, not {every!r}"
    )


def _is_cadence(value: object) -> TypeGuard[Cadence]:
    # a class that nobody called has a ``due`` too
    return isinstance(value, Cadence) and not isinstance(value, type)


def by_step_and_by_clock(cadence: Cadence) -> tuple[Cadence, Cadence]:
    """Split a cadence into the part that all ranks of a job answer alike, and the part that they may not: cadences that
    look at a clock, and those of other people."""
    parts = cadence.cadences if isinstance(cadence, AnyOf) else (cadence,)
    alike = [part for part in parts if isinstance(part, Steps | Milestones | Never)]
    others = [part for part in parts if part not in alike]
    return AnyOf(*alike) if alike else Never(), AnyOf(*others) if others else Never()
