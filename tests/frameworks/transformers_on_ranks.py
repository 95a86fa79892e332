"""Trains the tiny model on all ranks of a job, unbroken and stopped and resumed; see ``test_transformers``.

torchrun --nproc-per-node 2 transformers_on_ranks.py FOLDER ddp
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_transformers import StopAt, bits, same, trainer, transformers

_OPTIONS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
}


def _whole(of: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in bits(of).items()}


def main(folder: Path, kind: str) -> None:
    """Train, and have rank 0 write whether each rank has found the same bits."""
    options = _OPTIONS[kind]
    plain = trainer(str(folder / "plain"), transformers.Trainer, **options)
    plain.train()
    expected = _whole(plain)
    trainer(str(folder / "ours"), callbacks=[StopAt(8)], **options).train()
    resumed = trainer(str(folder / "ours"), **options)
    resumed.train(resume_from_checkpoint=True)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, same(_whole(resumed), expected))
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
