"""What DeepSpeed's own ``zero_to_fp32`` makes of a checkpoint of ZeRO is what the import makes of it, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from frameworks.deepspeed_trainings import Asked, train
from support import harness
from support.harness import Crews

from asyncckpt import Run
from asyncckpt.convert.formats import import_checkpoint

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="DeepSpeed has an environment of its own: make test-deepspeed"
    ),
]
LONG = 600.0


@pytest.fixture(scope="module")
def crews() -> Iterator[Crews]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    harness.CONTEXT.set_forkserver_preload(["torch._dynamo", "deepspeed", "asyncckpt.checkpointer"])
    kept = Crews()
    yield kept
    kept.close()


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_the_import_of_zero_agrees_with_zero_to_fp32(stage: int, dtype: str, crews: Crews, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    asked = Asked(folder=str(tmp_path), stage=stage, dtype=dtype, ours=False, last=4)
    crews(2).values(train, asked, timeout=LONG)
    done = import_checkpoint(tmp_path / "saved", tmp_path / "run", 4)
    wanted = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "saved"))
    found = Run(tmp_path / "run").load(component="model")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    assert any(f"ZeRO {stage}, 2 ranks" in note for note in done.notes)
