"""A trainer that is killed at any operation of a save, or at any moment, loses nothing that was acknowledged."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scenarios import (
    SCENARIOS,
    Scenario,
    acknowledge,
    acknowledged,
    check_visible,
    count,
    fork,
    leftovers,
    state_of,
)

from asyncckpt.testing import KillingOps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork and SIGKILL as on Linux")

#: What the fast suite tries of the operations of each scenario; ``make faults`` tries all.
FAST_STRIDE = 20
#: The generations of one trainer's life: an older one for retention to delete, one to link from, one more.
GENERATIONS = 2


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """zarr takes longer to import than a child lives."""
    with SCENARIOS["zarr-planes"].checkpointer(tmp_path_factory.mktemp("warm")) as run:
        run.save(1, state_of(1)).result()


class Trainers:
    """One run directory and the trainers that die in it, one after the other, each going on where the last got to."""

    def __init__(self, path: Path, scenario: Scenario) -> None:
        self.path = path
        self.scenario = scenario
        self.newest = 0
        self.deaths = self.in_flight = 0

    def _train(self, pipe: int, ops: KillingOps | None, generations: int, deferred: bool) -> None:
        scenario = self.scenario
        run = scenario.checkpointer(self.path)
        if ops is not None:
            run._store.ops = ops
        with run:
            for generation in range(self.newest + 1, self.newest + 1 + generations):
                pending = run.save(scenario.step(generation), state_of(generation))
                pending.add_done_callback(lambda done, g=generation: done.failed() or acknowledge(pipe, g))
                if not deferred:
                    pending.result()

    def at_operation(self, number: int, *, after: bool) -> bool:
        """Let one die at that operation of its life; False where its life was shorter."""
        pid, pipe = fork(lambda end: self._train(end, KillingOps(number, after=after), GENERATIONS, False))
        return self._follow(pid, pipe)

    def at_random(self, rng: random.Random, within_seconds: float = 0.12) -> None:
        """Let one die, by default within a tenth of a second."""
        deferred = rng.random() < 0.5
        pid, pipe = fork(lambda end: self._train(end, None, 1000, deferred))
        time.sleep(rng.uniform(0.0, within_seconds))
        os.kill(pid, signal.SIGKILL)
        assert self._follow(pid, pipe), "the trainer ended by itself"

    def _follow(self, pid: int, pipe: int) -> bool:
        _, status = os.waitpid(pid, 0)
        told = acknowledged(pipe)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0, "the trainer failed by itself"
        self.deaths += killed
        self.in_flight += any(name.startswith(".tmp-0") for name in leftovers(self.path))
        self._check(max(told, self.newest))
        return killed

    def _check(self, durable: int) -> None:
        visible = check_visible(self.path)
        newest = max(visible.values(), default=0)
        assert newest >= durable, f"generation {durable} was acknowledged, {newest} is the newest left"
        self.newest = newest


def _every_operation(path: Path, scenario: Scenario, numbers: Callable[[int], int], *, after: bool) -> Trainers:
    trainers = Trainers(path, scenario)
    number = 1
    while trainers.at_operation(number, after=after):
        number = numbers(number)
    return trainers


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_a_kill_at_an_operation_loses_nothing(scenario: Scenario, after: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{scenario}{after}")
    trainers = _every_operation(
        tmp_path / "run", scenario, lambda n: n + rng.randint(1, 2 * FAST_STRIDE - 1), after=after
    )
    assert trainers.deaths > 2, "hardly an operation was hit"
    assert trainers.in_flight > 0, "hardly a kill hit a save in flight"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_a_kill_at_every_operation_loses_nothing(scenario: Scenario, after: bool, tmp_path: Path) -> None:
    trainers = _every_operation(tmp_path / "run", scenario, lambda n: n + 1, after=after)
    assert trainers.deaths > 40
    print(f"{scenario}: {trainers.deaths} kills {'after' if after else 'before'} an operation")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_lose_nothing(tmp_path: Path) -> None:
    kills = count("SIGKILLS", 400)
    rng = random.Random(2026)
    runs = [Trainers(tmp_path / str(scenario), scenario) for scenario in SCENARIOS.values()]
    for _ in range(kills):
        rng.choice(runs).at_random(rng)
    deaths, in_flight = sum(run.deaths for run in runs), sum(run.in_flight for run in runs)
    assert deaths == kills
    assert in_flight > kills // 10, "hardly a kill hit a save in flight"
    print(f"{deaths} kills at random, {in_flight} of them with a save in flight")
