"""Every example runs as its docstring says, and runs again on what it left."""

from __future__ import annotations

from pathlib import Path

from support import scripts

from asyncckpt import Run

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, *arguments: str | Path) -> str:
    return scripts.run(EXAMPLES / f"{name}.py", *arguments)


def steps(run: Path) -> list[int]:
    return [entry.step for entry in Run(run).ls() if entry.damage is None]


def test_there_is_a_test_for_every_example() -> None:
    """Those of trainers are in frameworks/; ``pretrain_fsdp2`` has its own: ranks/test_example_fsdp2.py."""
    own = {
        "pretrain_fsdp2",
        "lightning_sharded",
        "lightning_trainer",
        "accelerate_loop",
        "transformers_trainer",
        "deepspeed_loop",
        "ray_train",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"minimal", "own_loop", "finetune"} | own


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


def test_finetune_reuses_the_backbone_and_leaves_the_head(tmp_path: Path) -> None:
    for _ in range(2):
        shown = example("finetune", "--out", tmp_path, "--steps", "20")
        assert "backbone of step 20 loaded" in shown
        assert "left alone: model.head.weight" in shown
        assert steps(tmp_path / "finetune") == [10, 20]
