"""Every example runs as its docstring says, and runs again on what it left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncckpt import Run

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    # one thread: with several the tiny layers of the examples spend their time waiting for each other
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(run: Path) -> list[int]:
    return [entry.step for entry in Run(run).ls() if entry.damage is None]


def test_there_is_a_test_for_every_example() -> None:
    """``pretrain_fsdp2`` has its own: ranks/test_example_fsdp2.py."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"minimal", "own_loop", "finetune", "pretrain_fsdp2"}


def test_minimal_saves_and_takes_up_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "minimal"
    assert "starting after step 0" in example("minimal", "--out", out, "--steps", "100")
    assert steps(out) == [50, 100]
    assert "starting after step 100" in example("minimal", "--out", out, "--steps", "250")
    assert steps(out) == [150, 200, 250]


def test_own_loop_resumes_inside_an_epoch(tmp_path: Path) -> None:
    out = tmp_path / "own"
    assert "starting after step 0, in epoch 0 at sample 0" in example("own_loop", "--out", out, "--steps", "100")
    again = example("own_loop", "--out", out, "--steps", "150")
    assert "starting after step 100, in epoch 1 at sample 2304" in again  # 100 steps of 64, 4096 samples an epoch
    assert steps(out)[-1] == 150
    assert not Run(out).verify(150)


@pytest.mark.parametrize("times", [1, 2])
def test_finetune_reuses_the_backbone_and_leaves_the_head(tmp_path: Path, times: int) -> None:
    for _ in range(times):
        shown = example("finetune", "--out", tmp_path, "--steps", "20")
        assert "backbone of step 20 loaded" in shown
        assert "left alone: model.head.weight" in shown
    assert steps(tmp_path / "finetune") == [10, 20]
