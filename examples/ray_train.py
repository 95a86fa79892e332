"""Train with Ray Train on two workers; checkpoints are written in the background, and Ray knows of them.

python examples/ray_train.py --storage runs/ray --name gpt
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from torch import nn
from torch.distributed.fsdp import fully_shard

import asyncckpt


def train(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}
    with asyncckpt.Checkpointer(config["out"], run=asyncckpt.RunOptions(create_parents=True)) as ckpt:
        ckpt.watch(optimizer)
        first = ckpt.resume(state)
        if first and dist.get_rank() == 0:
            print(f"went on from step {first}", flush=True)
        for step in range(first + 1, config["steps"] + 1):
            loss = model(torch.randn(16, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 2 == 0:
                saved = ckpt.save(step, state).result()  # durable: only now may Ray know of it
                ray.train.report(
                    {"loss": loss.item(), "step": step},
                    checkpoint=ray.train.Checkpoint.from_directory(saved.path),
                    checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
                )
            if config["fail"] and not first and step == 5 and dist.get_rank() == 1:
                os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="runs/ray", help="what all workers see")
    parser.add_argument("--name", default="gpt", help="the experiment's")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fail", action="store_true", help="lose a worker once")
    given = parser.parse_args()
    storage = os.path.abspath(given.storage)
    out = os.path.join(storage, given.name, "run")  # Ray takes no checkpoint from outside the experiment's directory
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    trainer = TorchTrainer(
        train,
        train_loop_config={"out": out, "steps": given.steps, "fail": given.fail},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            storage_path=storage, name=given.name, failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    )
    result = trainer.fit()
    print(f"best checkpoint: {result.checkpoint.path}")


if __name__ == "__main__":
    main()
