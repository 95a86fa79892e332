"""What retention keeps and what it deletes, and that the newest checkpoint is never among it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from asyncckpt.catalog.retention import (
    Candidate,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    KeepSteps,
    Policy,
    checked_policies,
    plan,
    plan_thinning,
    unreported,
)
from asyncckpt.errors import InvalidOption


@dataclass(frozen=True)
class Entry:
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False
    kind: str = "full"
    created_unix_seconds: float = 0.0


def at_hours(**hours: float) -> list[Entry]:
    """Step 1, 2, … saved so many hours after some moment."""
    return [Entry(int(name[1:]), created_unix_seconds=1e9 + 3600 * hour) for name, hour in hours.items()]


def entries(*steps: int, **options: Any) -> list[Entry]:
    return [Entry(step, **options) for step in steps]


def losses(*values: float | None) -> list[Entry]:
    """Steps 1, 2, … with these losses."""
    return [Entry(step, {} if loss is None else {"loss": loss}) for step, loss in enumerate(values, 1)]


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("policy", "candidates", "kept"),
    [
        (KeepAll(), entries(1, 2, 3), {1, 2, 3}),
        (KeepAll(), [], set()),
        (KeepLast(2), entries(1, 2, 3), {2, 3}),
        (KeepLast(5), entries(1, 2), {1, 2}),
        (KeepLast(2), entries(1, 2, 2), {1, 2}),
        (KeepLast(1), [], set()),
        (KeepEvery(10), entries(0, 5, 10, 15, 20), {0, 10, 20}),
        (KeepEvery(7), entries(1, 2), set()),
        (KeepFor(2), at_hours(s1=0, s2=1, s3=1.5, s4=3), {2, 3, 4}),
        (KeepFor(hours=0.5), at_hours(s1=0, s2=1), {2}),
        (KeepFor(2), [*at_hours(s2=0, s3=9), Entry(1)], {1, 3}),
        (KeepFor(2), at_hours(s1=5, s2=0), {1, 2}),  # the clock went back
        (KeepFor(2), [], set()),
        (KeepSteps([5, 1, 99]), entries(1, 2, 5), {1, 5}),
        (KeepSteps(range(0, 10, 5)), entries(4, 5), {5}),
        (KeepBest("loss", mode="min"), losses(3.0, 1.0, 2.0), {2}),
        (KeepBest("loss", n=2, mode="min"), losses(3.0, 1.0, 2.0), {2, 3}),
        (KeepBest("loss", mode="max"), losses(3.0, 1.0, 2.0), {1}),
        (KeepBest("loss", n=2, mode="max"), losses(3.0, 1.0, 2.0), {1, 3}),
        (KeepBest("loss", mode="min"), losses(1.0, 1.0, 1.0), {3}),
        (KeepBest("loss", n=2, mode="max"), losses(1.0, 1.0, 1.0), {2, 3}),
        (KeepBest("loss", n=3, mode="min"), losses(nan, 2.0, None), {2}),
        (KeepBest("loss", mode="max"), losses(nan, 2.0, nan), {2}),
        (KeepBest("loss", mode="min"), losses(nan, None), set()),
        (KeepBest("loss", mode="min"), losses(inf, None), {1}),
        (KeepBest("loss", mode="min"), losses(0.0, -inf), {2}),
        (KeepBest("accuracy", mode="min"), losses(1.0), {1}),
    ],
    ids=str,
)
def test_a_policy_keeps_these_steps(policy: Policy, candidates: Sequence[Candidate], kept: set[int]) -> None:
    assert policy.keep(candidates) == kept


def deleted(candidates: Sequence[Entry], policies: Sequence[Policy], protected: Sequence[int] = ()) -> list[int]:
    return [entry.step for entry in plan(candidates, policies, protected)]


@pytest.mark.parametrize(
    ("candidates", "policies", "thinned"),
    [
        (entries(*range(1, 8)), [KeepLast(1), KeepEvery(2, weights_only=True)], [2, 4, 6]),
        (entries(*range(1, 8)), [KeepLast(3), KeepEvery(2, weights_only=True)], [2, 4]),
        (entries(*range(1, 8)), [KeepLast(1), KeepEvery(4), KeepEvery(2, weights_only=True)], [2, 6]),
        (entries(2, 4, 6), [KeepEvery(2, weights_only=True)], [2, 4]),
        ([*entries(2, pinned=True), *entries(4, 6)], [KeepEvery(2, weights_only=True)], [4]),
        ([*entries(2, 4), *entries(2, 4, kind="weights")], [KeepEvery(2, weights_only=True)], [2]),
        (entries(1, 2, 3), [KeepLast(1)], []),
        (entries(1, 2, 3), [], []),
    ],
)
def test_of_what_nothing_else_keeps_the_weights_stay(
    candidates: Sequence[Entry], policies: Sequence[Policy], thinned: list[int]
) -> None:
    found = plan_thinning(candidates, policies)
    assert [(entry.step, entry.kind) for entry in found] == [(step, "full") for step in thinned]
    assert not {id(entry) for entry in found} & {id(entry) for entry in plan(candidates, policies)}


def test_without_policies_nothing_is_deleted() -> None:
    assert deleted(entries(1, 2, 3), []) == []


def test_what_any_policy_keeps_stays() -> None:
    assert deleted(entries(*range(1, 9)), [KeepLast(2), KeepEvery(3), KeepSteps([1])]) == [2, 4, 5]


def test_the_order_of_the_candidates_does_not_matter() -> None:
    assert deleted(entries(3, 1, 4, 2), [KeepLast(2)]) == [1, 2]


def test_a_pinned_checkpoint_is_never_deleted() -> None:
    assert deleted([*entries(1, pinned=True), *entries(2, 3)], [KeepLast(1)]) == [2]


def test_a_protected_checkpoint_is_never_deleted() -> None:
    assert deleted(entries(1, 2, 3), [KeepLast(1)], protected=[1]) == [2]


def test_a_pinned_checkpoint_counts_among_those_to_keep() -> None:
    assert deleted([Entry(1), Entry(2), Entry(3, pinned=True)], [KeepLast(2)]) == [1]


@pytest.mark.parametrize(
    "policy", [KeepSteps([1]), KeepEvery(100), KeepBest("loss", mode="min"), KeepBest("none", mode="min")], ids=str
)
def test_the_newest_full_checkpoint_is_never_deleted(policy: Policy) -> None:
    candidates = [Entry(1, {"loss": 0.0}), Entry(2, {"loss": 1.0}), Entry(3, {"loss": nan})]
    assert 3 not in deleted(candidates, [policy])
    assert deleted(entries(7), [policy]) == []


def test_a_newer_weights_only_checkpoint_does_not_expose_the_newest_full_one() -> None:
    candidates = [*entries(10, 20), *entries(30, kind="weights")]
    assert deleted(candidates, [KeepSteps([10])]) == [30]


def test_weights_only_checkpoints_do_not_push_out_full_ones() -> None:
    full, weights = entries(10, 20), entries(11, 12, 13, kind="weights")
    to_delete = plan([*full, *weights], [KeepLast(2)])
    assert [(entry.step, entry.kind) for entry in to_delete] == [(11, "weights")]


def test_kinds_of_the_same_step_are_judged_apart() -> None:
    full, weights = entries(1, 2, 3), entries(1, 2, kind="weights")
    to_delete = plan([*full, *weights], [KeepLast(1)])
    assert [(entry.step, entry.kind) for entry in to_delete] == [(1, "full"), (1, "weights"), (2, "full")]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(True),
        lambda: KeepLast(-1),
        lambda: KeepLast(2.0),  # type: ignore[arg-type]
        lambda: KeepLast(k="3"),  # type: ignore[arg-type]
        lambda: KeepEvery(0),
        lambda: KeepEvery(True),
        lambda: KeepEvery(2, weights_only=1),  # type: ignore[arg-type]
        lambda: KeepFor(0),
        lambda: KeepFor(True),
        lambda: KeepFor(nan),
        lambda: KeepFor(inf),
        lambda: KeepFor("3"),  # type: ignore[arg-type]
        lambda: KeepBest("", mode="min"),
        lambda: KeepBest(5, mode="min"),  # type: ignore[arg-type]
        lambda: KeepBest("loss", n=0, mode="min"),
        lambda: KeepBest("loss", n=True, mode="min"),
        lambda: KeepBest("loss", mode="minimum"),  # type: ignore[arg-type]
        lambda: KeepSteps([]),
        lambda: KeepSteps([-1]),
        lambda: KeepSteps([True]),
        lambda: KeepSteps("12"),  # type: ignore[arg-type]
        lambda: KeepSteps(5),  # type: ignore[arg-type]
        lambda: checked_policies([KeepLast]),
        lambda: checked_policies([3]),
        lambda: checked_policies(3),
        lambda: checked_policies("3"),
    ],
)
def test_a_senseless_option_is_refused_at_once(make: Any) -> None:
    with pytest.raises(InvalidOption):
        make()


@pytest.mark.parametrize(
    "policy",
    [
        KeepAll(),
        KeepLast(3),
        KeepEvery(1000),
        KeepBest("loss", n=2, mode="min"),
        KeepBest("acc", mode="max"),
        KeepSteps([3, 1]),
    ],
    ids=str,
)
def test_the_recorded_policy_is_the_one_that_ran(policy: Policy) -> None:
    assert eval(policy.describe()) == policy
    assert isinstance(policy, Policy)
    assert hash(policy) == hash(eval(policy.describe()))


def test_a_metric_that_nobody_reports_deletes_nothing_and_is_named() -> None:
    run, policies = losses(3.0, 1.0, 2.0), [KeepBest("los", mode="min")]
    assert plan(run, policies) == []
    assert unreported(run, policies) == ["los"]
    assert unreported(run, [KeepBest("loss", mode="min")]) == []
    assert unreported([], policies) == []


def test_only_a_loss_needs_no_direction() -> None:
    assert KeepBest("val/loss").mode == "min"
    assert KeepBest("loss", mode="max").mode == "max"
    for metric in ("accuracy", "val/loss_gap", "bleu"):
        with pytest.raises(InvalidOption, match="mode='max'"):
            KeepBest(metric)
