"""Lightning saves and resumes through asyncckpt as it does by itself."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits
from frameworks.killing import in_child
from frameworks.lightning_trainings import fit

from asyncckpt.integrations.lightning import AsyncckptIO

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]


def test_resumed_training_ends_as_plain_lightnings_unbroken_one(tmp_path: Path) -> None:
    unbroken, _ = fit(tmp_path / "plain", [])
    fit(tmp_path / "ours", [AsyncckptIO()], epochs=2)
    resumed, trainer = fit(tmp_path / "ours", [AsyncckptIO()], ckpt_path="last")
    assert trainer.global_step == 20
    assert bits(resumed) == bits(unbroken)


def test_killed_in_the_middle_of_saves_it_resumes_and_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    def train(folder: Path, plugins: list[Any], **options: Any) -> None:
        model, _ = fit(folder, plugins, **options)
        torch.save(model.state_dict(), folder / "end.pt")

    in_child(lambda: train(tmp_path / "plain", []))
    unbroken = bits(torch.load(tmp_path / "plain" / "end.pt"))
    _, calls = in_child(lambda: train(tmp_path / "ours", [AsyncckptIO()]))
    seed = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.randrange(1 << 30)
    points = sorted(random.Random(seed).sample(range(2, calls), 6))
    for point in points:
        folder = tmp_path / f"killed-{point}"
        killed, _ = in_child(lambda folder=folder: train(folder, [AsyncckptIO()], ckpt_path="last"), point)
        assert killed
        in_child(lambda folder=folder: train(folder, [AsyncckptIO()], ckpt_path="last"))
        assert bits(torch.load(folder / "end.pt")) == unbroken, f"killed at call {point} of {calls}, seed {seed}"
