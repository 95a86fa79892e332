"""A save comes when it is due: not twice, not late, and not never because the loop skipped a number."""

from __future__ import annotations

from typing import Any

import pytest

from asyncckpt.errors import InvalidOption
from asyncckpt.loop.cadence import AnyOf, Cadence, Milestones, Minutes, Never, Steps, parse


def saved_steps(cadence: Cadence, steps: range, last: int | None = None, seconds_per_step: float = 1.0) -> list[int]:
    """The steps saved by a loop in which every save that is due is made."""
    saved: list[int] = []
    saved_seconds = steps[0] * seconds_per_step if last is None else last * seconds_per_step
    for step in steps:
        now = step * seconds_per_step
        if cadence.due(step, now, last, saved_seconds):
            saved.append(step)
            last, saved_seconds = step, now
    return saved


@pytest.mark.parametrize(
    ("cadence", "steps", "last", "saved"),
    [
        (Steps(10), range(1, 31), None, [10, 20, 30]),
        (Steps(1), range(1, 4), None, [1, 2, 3]),
        (Steps(10), range(11), None, [10]),
        (Steps(10), range(21, 41), 20, [30, 40]),
        (Steps(10), range(26, 41), 25, [30, 40]),
        (Steps(100), range(0, 701, 7), None, [105, 203, 301, 406, 504, 602, 700]),
        (Steps(10), range(13, 31), 8, [13, 20, 30]),
        (Milestones([5, 12]), range(1, 20), None, [5, 12]),
        (Milestones([0]), range(3), None, [0]),
        (Milestones([5, 6, 12]), range(1, 20, 4), None, [5, 9, 13]),
        (Milestones([5, 12]), range(6, 20), 5, [12]),
        (Milestones([5]), range(6, 20), 5, []),
        (Minutes(1), range(181), None, [60, 120, 180]),
        (Minutes(0.5), range(61), None, [30, 60]),
        (Steps(50) | Minutes(1), range(1, 151), None, [50, 100, 150]),
        (Steps(100) | Minutes(1), range(201), None, [60, 100, 160, 200]),
        (Never(), range(100), None, []),
    ],
    ids=str,
)
def test_saves_come_at_these_steps(cadence: Cadence, steps: range, last: int | None, saved: list[int]) -> None:
    assert saved_steps(cadence, steps, last) == saved


@pytest.mark.parametrize("cadence", [Steps(10), Steps(1), Minutes(1), Milestones([20])], ids=str)
def test_a_saved_step_is_not_saved_again(cadence: Cadence) -> None:
    assert not cadence.due(20, 1e9, 20, 0.0)


@pytest.mark.parametrize("cadence", [Steps(10), Milestones([20])], ids=str)
def test_a_skipped_save_is_made_up_at_the_next_step(cadence: Cadence) -> None:
    assert cadence.due(20, 0.0, 10, 0.0)
    assert cadence.due(21, 0.0, 10, 0.0)


@pytest.mark.parametrize("cadence", [Steps(10), Milestones([20])], ids=str)
def test_a_loop_that_went_back_still_asks_for_saves(cadence: Cadence) -> None:
    assert cadence.due(20, 0.0, 1000, 0.0)
    assert not cadence.due(21, 0.0, 1000, 0.0)


def test_combinations_are_flat() -> None:
    combined = Steps(10) | Minutes(5) | Milestones([3])
    assert combined == AnyOf(Steps(10), Minutes(5), Milestones([3]))
    assert repr(combined) == "AnyOf(Steps(n=10), Minutes(m=5), Milestones(steps=(3,)))"
    with pytest.raises(TypeError):
        Steps(10) | 5  # type: ignore[operator]


@pytest.mark.parametrize(
    ("every", "cadence"),
    [
        (None, Never()),
        (100, Steps(100)),
        (Minutes(5), Minutes(5)),
        ([100, Minutes(5)], AnyOf(Steps(100), Minutes(5))),
        ((100,), AnyOf(Steps(100))),
        ([Steps(1) | Minutes(1), 5], AnyOf(Steps(1), Minutes(1), Steps(5))),
    ],
    ids=str,
)
def test_every_is_read_as_this_cadence(every: Any, cadence: Cadence) -> None:
    assert parse(every) == cadence


@pytest.mark.parametrize(
    "every",
    [0, -1, True, 2.5, "100", [], [None], ["a"], [True], Steps, {100}, object()],
    ids=lambda every: str(every).partition(" at 0x")[0],
)
def test_a_senseless_every_is_refused(every: Any) -> None:
    with pytest.raises(InvalidOption):
        parse(every)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Steps(0),
        lambda: Steps(True),
        lambda: Steps(1.5),  # type: ignore[arg-type]
        lambda: Steps("1"),  # type: ignore[arg-type]
        lambda: Minutes(0),
        lambda: Minutes(-1),
        lambda: Minutes(True),
        lambda: Minutes(float("nan")),
        lambda: Minutes(float("inf")),
        lambda: Minutes("5"),  # type: ignore[arg-type]
        lambda: Milestones([]),
        lambda: Milestones([-1]),
        lambda: Milestones([True]),
        lambda: Milestones("12"),  # type: ignore[arg-type]
        lambda: Milestones(5),  # type: ignore[arg-type]
        AnyOf,
        lambda: AnyOf(5),  # type: ignore[arg-type]
        lambda: AnyOf(Steps),  # type: ignore[arg-type]
    ],
)
def test_a_senseless_option_is_refused_at_once(make: Any) -> None:
    with pytest.raises(InvalidOption):
        make()


def test_a_cadence_of_ones_own_is_accepted() -> None:
    class OnTuesdays:
        def due(self, step: int, now_seconds: float, last_saved_step: int | None, last_saved_seconds: float) -> bool:
            return True

    assert parse(OnTuesdays()).due(1, 0.0, None, 0.0)
    assert (Steps(10) | OnTuesdays()).due(1, 0.0, None, 0.0)
