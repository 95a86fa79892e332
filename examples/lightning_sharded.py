"""Train a model that Lightning shards (FSDP2); kill the job at any time and run it again, with any number of ranks.

torchrun --nproc-per-node 2 examples/lightning_sharded.py --out runs/lightning-sharded
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt.integrations.lightning import AsyncckptModelParallelStrategy, RandomState


class Regression(lightning.LightningModule):
    """Learns the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(-1), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning-sharded"))
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(256, 16)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        max_epochs=given.epochs,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=AsyncckptModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),  # the one line
        logger=False,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint(dirpath=given.out, monitor="loss", save_top_k=2, save_last="link"), RandomState()],
    )
    trainer.fit(Regression(), DataLoader(TensorDataset(x, x.sum(-1)), 16, shuffle=True), ckpt_path="last")
    if trainer.is_global_zero:
        print(f"step {trainer.global_step}, loss {trainer.callback_metrics.get('loss', float('nan')):.4f}")


if __name__ == "__main__":
    main()
