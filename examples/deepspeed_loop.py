"""Train with DeepSpeed (ZeRO 2) and checkpoints in the background; kill it at any time and run it again.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_loop.py --out runs/deepspeed
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import asyncckpt
from asyncckpt.integrations.deepspeed import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/deepspeed")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    saves = attach(engine, keep=asyncckpt.KeepLast(2))
    path, state = engine.load_checkpoint(given.out)  # what "latest" says; (None, None) where there is nothing yet
    first = state["step"] if path else 0
    for step in range(first, given.steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(8, 16, generator=generator).to(torch.bfloat16)
        engine.backward((engine(x).squeeze(-1) - x.sum(-1)).float().square().mean())
        engine.step()
        if (step + 1) % 5 == 0:
            engine.save_checkpoint(given.out, client_state={"step": step + 1})
    saves.wait()
    if dist.get_rank() == 0:
        print(f"steps {first} to {given.steps}, checkpoints in {given.out}")
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
