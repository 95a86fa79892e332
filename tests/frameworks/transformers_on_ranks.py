"""Trains the tiny model on all ranks of a job, unbroken and stopped and resumed; see ``test_transformers``.

torchrun --nproc-per-node 2 transformers_on_ranks.py FOLDER ddp|fsdp2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from frameworks.fsdp_on_cpu import local, use_fsdp_on_cpu
from support.tiny_transformers import AsyncTrainer, StopAt, bits, same, trainer, transformers

from asyncckpt import Run
from asyncckpt.convert.trainer_folder import export_for_trainer

#: With sharded checkpoints, the plain trainer's are of many files, which no rank reads in whole.
FSDP2 = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}


def trained(folder: Path, kind: type[Any], options: dict[str, Any], stop: int = 0, *, resume: bool = False) -> Any:
    """Train, and return what this rank has of the weights and of the optimizer."""
    one = trainer(str(folder), kind, callbacks=[StopAt(stop)] if stop else [], **options)
    assert one.is_fsdp_enabled == ("fsdp" in options)
    one.train(resume_from_checkpoint=resume)
    return local(bits(one))


def main(folder: Path, kind: str) -> None:
    """Train, and have rank 0 write whether each rank has found the same bits, and whether the plain trainer refuses."""
    use_fsdp_on_cpu()
    options: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP2} if kind == "fsdp2" else {}
    plain = transformers.Trainer
    expected = trained(folder / "plain", plain, options)
    trained(folder / "ours", AsyncTrainer, options, 8)
    resumed = trained(folder / "ours", AsyncTrainer, options, resume=True)
    trained(folder / "mixed", plain, options, 8)
    gone_on = trained(folder / "mixed", AsyncTrainer, options, resume=True)
    if dist.get_rank() == 0:
        (folder / "exported").mkdir()
        run = Run(folder / "ours")
        with run.open_entry(next(entry for entry in run.ls() if entry.step == 6)) as opened:
            export_for_trainer(opened, folder / "exported" / "checkpoint-6", fsdp=kind == "fsdp2")
    dist.barrier()
    full = options | ({"fsdp_config": FSDP2 | {"state_dict_type": "FULL_STATE_DICT"}} if options else {})
    exported = trained(folder / "exported", plain, full, resume=True)
    refused = False
    try:
        trained(folder / "ours", plain, options | {"max_steps": 20}, resume=True)
    except Exception:
        refused = True
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [*(same(one, expected) for one in (resumed, gone_on, exported)), refused])
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    # gloo's thread lets go of the gathered tensors while this one waits: at exit that would abort the process
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
