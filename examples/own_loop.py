"""This loop has everything: EMA, GradScaler, scheduler, a data loader that resumes inside an epoch, hyper-parameters,
metrics, retention, and a save on SIGTERM within a deadline.

    python examples/own_loop.py --out runs/own
    python examples/own_loop.py --out runs/own --steps 600   # goes on from step 300
    kill -TERM <pid>                                         # saves, then exits with code 143
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import asyncckpt


class Batches:
    """Says where it stands, as any data loader must that resumes; torchdata's ``StatefulDataLoader`` is another."""

    def __init__(self, samples: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, 32, generator=generator)
        self.targets = self.inputs.square().sum(1, keepdim=True)
        self.batch, self.seed, self.epoch, self.position = batch, seed, 0, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(self.seed + self.epoch))
            while self.position + self.batch <= len(order):
                chosen = order[self.position : self.position + self.batch]
                # counted before the batch is handed out, so that a save right after it is past it
                self.position += self.batch
                yield self.inputs[chosen], self.targets[chosen]
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()

    hparams = {"width": 128, "lr": 3e-3, "betas": (0.9, 0.95), "warmup": 20, "batch": 64}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, hparams["width"]),
        nn.BatchNorm1d(hparams["width"]),  # its buffers change in the forward pass
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(hparams["width"], 1),
    ).to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=hparams["lr"],
        betas=hparams["betas"],
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=hparams["warmup"])
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    loader = Batches(samples=4096, batch=hparams["batch"], seed=7)

    state = {
        "model": model,
        "ema": ema,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "loader": loader,
        "rng": asyncckpt.RngState(),
        "hparams": hparams,  # plain data is saved and restored exactly, tuples included
    }
    ckpt = asyncckpt.Checkpointer(
        args.out,
        every=[asyncckpt.Steps(args.every), asyncckpt.Minutes(10)],
        keep=[asyncckpt.KeepLast(2), asyncckpt.KeepBest("loss", mode="min"), asyncckpt.KeepEvery(200)],
        config=hparams,
        preemption=asyncckpt.Preemption(deadline_seconds=30),
        run=asyncckpt.RunOptions(create_parents=True),
    )
    ckpt.watch(optimizer)

    with ckpt:
        start = ckpt.resume(state)
        print(f"starting after step {start}, in epoch {loader.epoch} at sample {loader.position}", flush=True)
        batches = iter(loader)
        for step in range(start + 1, args.steps + 1):
            inputs, targets = (tensor.to(device) for tensor in next(batches))
            with torch.autocast(device, enabled=device == "cuda"):
                loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            # the EMA belongs to no watched optimizer: it is copied before ``step`` returns, so no guard() is needed
            ema.update_parameters(model)
            ckpt.step(step, state, metrics={"loss": loss.item()})
            if step % 50 == 0:
                print(f"step {step}: loss {loss.item():.3f}, lr {scheduler.get_last_lr()[0]:.2g}", flush=True)

    for entry in ckpt.ls():
        print(f"{entry.path}: {entry.nbytes / 1e6:.2f} MB, loss {entry.metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
