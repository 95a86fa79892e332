"""Lightning saves and resumes through asyncckpt as it does by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import bits
from frameworks.lightning_trainings import fit

from asyncckpt.integrations.lightning import AsyncckptIO

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]


def test_resumed_training_ends_as_plain_lightnings_unbroken_one(tmp_path: Path) -> None:
    unbroken, _ = fit(tmp_path / "plain", [])
    fit(tmp_path / "ours", [AsyncckptIO()], epochs=2)
    resumed, trainer = fit(tmp_path / "ours", [AsyncckptIO()], ckpt_path="last")
    assert trainer.global_step == 20
    assert bits(resumed) == bits(unbroken)
