"""The examples in other people's trainers run, and go on where they were."""

from __future__ import annotations

import subprocess
import sys
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


def test_sharded_lightning_trainer_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    shown = []
    for ranks, epochs in (2, 2), (1, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(EXAMPLES / "lightning_sharded.py"), "--out", str(tmp_path), "--epochs", str(epochs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        shown.append(done.stdout)
    assert "step 16," in shown[0]
    assert "step 32," in shown[1]
