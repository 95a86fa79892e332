"""Train in Lightning with checkpoints in the background; kill it at any time and run it again.

python examples/lightning_trainer.py --out runs/lightning
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt.integrations.lightning import AsyncckptIO, RandomState


class Regression(lightning.LightningModule):
    """Learns the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(-1), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(256, 16)
    trainer = lightning.Trainer(
        max_epochs=given.epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint(dirpath=given.out, monitor="loss", save_top_k=2, save_last="link"), RandomState()],
        plugins=[AsyncckptIO()],  # the one line
    )
    trainer.fit(Regression(), DataLoader(TensorDataset(x, x.sum(-1)), 32, shuffle=True), ckpt_path="last")
    print(f"step {trainer.global_step}, loss {trainer.callback_metrics.get('loss', float('nan')):.4f}")


if __name__ == "__main__":
    main()
