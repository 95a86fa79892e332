"""Trains the tiny model on all ranks of a job, unbroken and stopped and resumed; see ``test_transformers``.

torchrun --nproc-per-node 2 transformers_on_ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_transformers import StopAt, bits, same, trainer, transformers


def main(folder: Path) -> None:
    """Train, and have rank 0 write whether each rank has found the same bits."""
    plain = trainer(str(folder / "plain"), transformers.Trainer)
    plain.train()
    expected = bits(plain)
    trainer(str(folder / "ours"), callbacks=[StopAt(8)]).train()
    resumed = trainer(str(folder / "ours"))
    resumed.train(resume_from_checkpoint=True)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, same(bits(resumed), expected))
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    # gloo's thread lets go of the gathered tensors while this one waits: at exit that would abort the process
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
