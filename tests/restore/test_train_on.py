"""A training that was resumed goes on as if it had never been broken, bit by bit, whatever is trained and however; and
a checkpoint holds the moment of its save, whatever the loop changed meanwhile, or that save fails and says so."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.options import by_stage
from support.trainings import HABITS, QUANTISED, Recipe, Training, differences, fingerprint, recipes

from asyncckpt import Checkpointer, Delta, Run, SaveFailed
from asyncckpt.testing import SlowOps

STEPS = 6
_SEED = int(os.environ.get("ASYNCCKPT_TRAININGS_SEED", "7"))


#: How a run is written: what a restore must not depend on.
WAYS: list[dict[str, Any]] = [
    {},
    {"format": "zarr"},
    {"codec": "planes"},
    {"format": "zarr", "codec": "zstd"},
    {"incremental": False},
    {"codec": "planes", "delta": Delta(chain=2)},
]


def _run(path: Path, rng: random.Random) -> Checkpointer:
    """A run whose disk is so slow, and whose memory is so scarce, that a save is still being copied when the next
    training step begins."""
    run = Checkpointer(path, **by_stage(extent_bytes=64 << 10, staging_bytes=1 << 20, **rng.choice(WAYS)))
    run._store.ops = SlowOps(0.002)
    return run


def _train(recipe: Recipe, path: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Train, and save after each step but the last; the values at each acknowledged save, and those at the end."""
    rng = random.Random(recipe.seed)
    training, held, saves = Training(recipe, 1), {}, {}
    with _run(path, rng) as run:
        if rng.random() < 0.8:
            run.watch(training.optimizer)
        for number in range(1, STEPS + 1):
            training.step(number)
            if number < STEPS:
                held[number] = fingerprint(training.state())
                # the news of a save that failed is delivered by the next one, which then is not begun
                with contextlib.suppress(SaveFailed):
                    saves[number] = run.save(number, training.state())
        final = fingerprint(training.state())
        failed = {number: save.exception(60) for number, save in saves.items()}
    for number, error in failed.items():
        if error is not None:
            assert isinstance(error, SaveFailed), f"{recipe}: step {number}: {error!r}"
            assert HABITS[recipe.habit].told, f"{recipe}: step {number} failed without a cause: {error}"
    return {number: held[number] for number, error in failed.items() if error is None}, final


def _resumed(recipe: Recipe, path: Path, number: int, used: bool) -> Training:
    """New objects, some of which have trained already, with the checkpoint of this step in them."""
    training = Training(recipe, 2)
    if used:
        training.step(1)
    report = Run(path).restore(training.state(), number)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ()), f"{recipe}: {report}"
    return training


def _check(recipe: Recipe, path: Path) -> None:
    held, final = _train(recipe, path)
    assert held, f"{recipe}: no save came to its end"
    rng = random.Random(recipe.seed + 1)
    for number in rng.sample(sorted(held), min(2, len(held))):
        training = _resumed(recipe, path, number, used=rng.random() < 0.5)
        wrong = differences(fingerprint(training.state()), held[number])
        assert not wrong, f"{recipe}: step {number} is not as it was saved: {wrong[:5]}"
        for later in range(number + 1, STEPS + 1):
            training.step(later)
        wrong = differences(fingerprint(training.state()), final)
        assert not wrong, f"{recipe}: resumed at {number}, it trains another model: {wrong[:5]}"


@pytest.mark.parametrize("recipe", list(recipes(24, _SEED)), ids=str)
def test_a_training_that_was_resumed_goes_on_as_if_never_broken(recipe: Recipe, tmp_path: Path) -> None:
    _check(recipe, tmp_path / "run")


@pytest.mark.parametrize("optimizer", QUANTISED)
@pytest.mark.parametrize(("module", "dtype", "habit"), [("flat", "fp32", "plain"), ("convolutions", "bf16", "perturb")])
def test_optimizers_with_quantised_state_go_on(
    optimizer: str, module: str, dtype: str, habit: str, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    _check(Recipe(_SEED, module, optimizer, dtype, habit=habit), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(20))
def test_thousands_of_trainings_go_on_as_if_never_broken(part: int, tmp_path: Path) -> None:
    count = int(os.environ.get("ASYNCCKPT_TRAININGS", "2000")) // 20
    harm = []
    for number, recipe in enumerate(recipes(count, _SEED + 1000 + part)):
        try:
            _check(recipe, tmp_path / f"run-{number}")
        except AssertionError as failed:
            harm.append(str(failed))
    assert not harm, f"{len(harm)} of {count}: " + "\n".join(harm[:20])
