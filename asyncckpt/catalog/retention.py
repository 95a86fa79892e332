"""Retention policies say which checkpoints to keep, and ``plan`` what may be deleted: what no policy keeps.

Nothing here touches a disk. Whatever the policies say, a pinned or protected checkpoint and the newest full one stay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

from asyncckpt.catalog.names import moves
from asyncckpt.errors import InvalidOption


class Candidate(Protocol):
    """Says what a policy may know of a checkpoint. ``kind`` is ``full`` or ``weights``. ``sequence`` rises from save to
    save of a run, also where training went back to an earlier step. Where nobody knows it, it is 0, and the step
    decides."""

    @property
    def step(self) -> int: ...

    @property
    def sequence(self) -> int: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def pinned(self) -> bool: ...

    @property
    def kind(self) -> str: ...


C = TypeVar("C", bound=Candidate)


@runtime_checkable
class Policy(Protocol):
    """Decides which checkpoints stay. A policy must be pure: it answers the same for the same candidates, on each
    rank."""

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        """Return the steps to keep. ``candidates`` are of one kind, the oldest save first."""
        ...

    def describe(self) -> str:
        """Return one line for the configuration that manifests record."""
        ...


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep every checkpoint."""

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        return {candidate.step for candidate in candidates}

    def describe(self) -> str:
        return "KeepAll()"


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest ``k``: those that were saved last, which after going back are not those of the largest steps."""

    k: int

    def __post_init__(self) -> None:
        _check_count("KeepLast: k", self.k)

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        newest_first = [candidate.step for candidate in sorted(candidates, key=age, reverse=True)]
        return set(list(dict.fromkeys(newest_first))[: self.k])

    def describe(self) -> str:
        return f"KeepLast({self.k})"


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keep the steps that ``n`` divides. ``weights_only``: keep of them what a weights-only save would have, once no
    other policy keeps the whole: the modules, with config, metrics and assets. Optimizer, scheduler and RNGs go. What
    has no module is kept whole."""

    n: int
    weights_only: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_count("KeepEvery: n", self.n)
        if type(self.weights_only) is not bool:
            raise InvalidOption(f"KeepEvery: weights_only must be True or False, not {self.weights_only!r}")

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        return {candidate.step for candidate in candidates if candidate.step % self.n == 0}

    def describe(self) -> str:
        return f"KeepEvery({self.n}{', weights_only=True' if self.weights_only else ''})"


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the ``n`` with the smallest (``mode="min"``) or largest (``mode="max"``) value of ``metric``.

    The mode must be given, but for a metric whose name ends in ``loss``: less of that is better. Raises
    ``InvalidOption``.

    Metrics are those of ``save`` and, later, of ``Run.annotate``: where checkpoints are evaluated after the fact, keep
    them until then by another policy, such as ``KeepLast(5)`` beside this one.
    A checkpoint without the metric, or where it is nan, is never among the best; of equals the later ones are kept.
    Where no checkpoint has the metric at all, every one is kept: it may be reported later, or its name may be wrong.
    """

    metric: str
    n: int = 1
    mode: Literal["min", "max", ""] = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if type(self.metric) is not str or not self.metric:
            raise InvalidOption(f"KeepBest: metric must be the name of a metric, not {self.metric!r}")
        _check_count("KeepBest: n", self.n)
        if self.mode == "" and self.metric.casefold().endswith("loss"):
            object.__setattr__(self, "mode", "min")
        if self.mode not in ("min", "max"):
            raise InvalidOption(
                f"KeepBest({self.metric!r}): say whether less is better, mode='min', or more, mode='max'; "
                f"not {self.mode!r}"
            )

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        if self.is_unreported(candidates):
            return {candidate.step for candidate in candidates}
        return {candidate.step for candidate in self.ranked(candidates)[: self.n]}

    def ranked(self, candidates: Iterable[C]) -> list[C]:
        """Return the candidates that have a value of the metric which can be compared, the best first, and of equals
        the later save first."""
        sign = 1 if self.mode == "min" else -1
        have = [one for one in candidates if not math.isnan(one.metrics.get(self.metric, math.nan))]
        return sorted(have, key=lambda one: (sign * one.metrics[self.metric], [-part for part in age(one)]))

    def is_unreported(self, candidates: Iterable[Candidate]) -> bool:
        """Return whether no candidate has the metric."""
        return all(self.metric not in candidate.metrics for candidate in candidates)

    def describe(self) -> str:
        return f"KeepBest({self.metric!r}, n={self.n}, mode={self.mode!r})"


@dataclass(frozen=True, slots=True)
class KeepSteps:
    """Keep these steps: milestones."""

    steps: Iterable[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _checked_steps(self.steps))

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        return {candidate.step for candidate in candidates}.intersection(self.steps)

    def describe(self) -> str:
        return f"KeepSteps({list(self.steps)})"


@dataclass(frozen=True, slots=True)
class KeepFor:
    """Keep what was saved in the last ``hours`` hours before the newest save of the same kind.

    It counts from the newest save and not from now, so a run that stood still for a week has all of its checkpoints
    when it goes on. The times are those of the clocks of the hosts that saved: have ``KeepLast`` beside it where a
    clock may be wrong. A checkpoint of which nobody knows when it was saved stays.
    """

    hours: float

    def __post_init__(self) -> None:
        usable = isinstance(self.hours, int | float) and not isinstance(self.hours, bool)
        if not usable or not 0 < self.hours < math.inf:
            raise InvalidOption(f"KeepFor: hours must be a number > 0, not {self.hours!r}")

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        if not candidates:
            return set()
        since = _saved_at(max(candidates, key=age)) - self.hours * 3600
        return {one.step for one in candidates if _saved_at(one) >= since or not _saved_at(one)}

    def describe(self) -> str:
        return f"KeepFor(hours={self.hours})"


#: These policies tell the milestones and the best of one line of training.
_OF_ONE_LINE = (KeepEvery, KeepBest, KeepSteps)


def checked_policies(keep: object) -> tuple[Policy, ...]:
    """Return the policies that ``keep`` is or lists. Raises ``InvalidOption`` for anything else."""
    found = (keep,) if isinstance(keep, Policy) or not isinstance(keep, Iterable) else tuple(keep)
    for policy in found:
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise InvalidOption(f"keep takes retention policies such as KeepLast(3), not {policy!r:.80}")
    return found


def age(candidate: Candidate) -> tuple[int, int]:
    """Return the key that sorts checkpoints of one kind, the oldest save first."""
    return getattr(candidate, "sequence", 0), candidate.step


def plan(candidates: Iterable[C], policies: Sequence[Policy], protected: Collection[int] = ()) -> list[C]:
    """Return the candidates to delete, the oldest save first: those that no policy keeps. Pure.

    Full checkpoints and weights-only ones are judged apart. Pinned candidates, the steps in ``protected``, the newest
    full checkpoint, what a name means that moves (``_named``), and what somebody made of several checkpoints
    (``beside``) are never among them; without policies nothing is. Where a candidate is ``abandoned`` (see
    ``CheckpointInfo``), policies that name milestones and the best keep it until training has reached its step again;
    all others count it like any other.
    """
    if not policies:
        return []
    in_order = sorted((one for one in candidates if not getattr(one, "beside", False)), key=age)
    reached = max((one.step for one in in_order if not _left(one)), default=-1)
    groups: dict[str, list[C]] = {}
    for candidate in in_order:
        groups.setdefault(candidate.kind, []).append(candidate)
    to_delete: list[C] = []
    named = _named(in_order)
    for kind, group in groups.items():
        kept = _kept(kind, group, policies, reached) | set(protected)
        to_delete += [one for one in group if one.step not in kept and not one.pinned and id(one) not in named]
    return sorted(to_delete, key=age)


def plan_thinning(candidates: Sequence[C], policies: Sequence[Policy], protected: Collection[int] = ()) -> list[C]:
    """Return the full candidates of which only the weights are kept, the oldest save first: those that nothing keeps
    but policies with ``weights_only``. Pure. None of them is among what ``plan`` returns."""
    whole = [policy for policy in policies if not getattr(policy, "weights_only", False)]
    if len(whole) == len(policies):
        return []
    unkept = plan(candidates, whole or [_KeepNone()], protected)
    deleted = {id(one) for one in plan(candidates, policies, protected)}
    return [one for one in unkept if id(one) not in deleted and one.kind == "full"]


class _KeepNone:
    """Keeps no checkpoint; ``plan`` keeps the newest and what is pinned all the same."""

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        return set()

    def describe(self) -> str:
        return "no policy"


def _kept(kind: str, group: Sequence[C], policies: Sequence[Policy], reached: int) -> set[int]:
    """Return the steps of one kind that the policies keep. ``reached``: the largest step on training's line."""
    kept: set[int] = set()
    ahead = tuple(one for one in group if not _left(one) or one.step > reached)
    for policy in policies:
        kept |= policy.keep(ahead if isinstance(policy, _OF_ONE_LINE) else tuple(group))
        if isinstance(policy, KeepBest):  # what training has left takes no place from the best that it has now
            kept |= policy.keep(tuple(one for one in group if not _left(one)))
    return kept | ({group[-1].step} if kind == "full" else set())


def _named(in_order: Sequence[Candidate]) -> set[int]:
    """Return the ``id`` of each candidate that a name means which may mean another one later. Such a name has no digits
    (``last``), or an older candidate has it too, which the name must not come to mean because this one is deleted."""
    means: dict[str, tuple[int, bool]] = {}
    for candidate in in_order:
        for name in getattr(candidate, "names", ()):
            means[name] = id(candidate), name in means or moves(name)
    return {candidate for candidate, stays in means.values() if stays}


def unreported(candidates: Sequence[Candidate], policies: Sequence[Policy]) -> list[str]:
    """Return the metrics that a ``KeepBest`` among the policies ranks by and no full checkpoint has."""
    full = [candidate for candidate in candidates if candidate.kind == "full"]
    best = (policy for policy in policies if isinstance(policy, KeepBest))
    return [policy.metric for policy in best if full and policy.is_unreported(full)]


def _left(candidate: Candidate) -> bool:
    """Whether training went back and left this checkpoint."""
    return bool(getattr(candidate, "abandoned", False))


def _saved_at(candidate: Candidate) -> float:
    """Return when the checkpoint was saved, in seconds since 1970, 0 where nobody knows."""
    return float(getattr(candidate, "created_unix_seconds", 0.0))


def _check_count(what: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise InvalidOption(f"{what} must be a whole number >= 1, not {value!r}")


def _checked_steps(steps: Iterable[int]) -> tuple[int, ...]:
    chosen = None if isinstance(steps, str | bytes) or not isinstance(steps, Iterable) else tuple(steps)
    if not chosen or not all(type(step) is int and step >= 0 for step in chosen):
        raise InvalidOption(f"KeepSteps: steps must be one or more whole numbers >= 0, not {steps!r}")
    return tuple(sorted(set(chosen)))
