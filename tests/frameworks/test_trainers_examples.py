"""The examples in other people's trainers run, and go on where they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import scripts

from asyncckpt import Run

pytestmark = pytest.mark.frameworks
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_lightning_trainer_goes_on(tmp_path: Path) -> None:
    for epochs in (2, 3):
        shown = scripts.run(EXAMPLES / "lightning_trainer.py", "--out", tmp_path, "--epochs", str(epochs))
        assert f"step {8 * epochs}," in shown
    assert Run(tmp_path / "asyncckpt-run").newest().step == 24


def test_accelerate_loop_goes_on(tmp_path: Path) -> None:
    for epochs in (2, 3):
        shown = scripts.run(EXAMPLES / "accelerate_loop.py", "--out", tmp_path / "run", "--epochs", str(epochs))
        assert f"step {8 * epochs}," in shown
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [15, 20]
