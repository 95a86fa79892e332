"""A small training in Lightning whose end depends on everything that has to come back: weights, two moments, a buffer,
a learning-rate schedule, random numbers, and the position in shuffled data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

BATCHES = 5


class ShuffledLoader:
    """Gives batches in an order of its own, and can be asked for its position, as torchdata's loaders can."""

    def __init__(self) -> None:
        self.data = torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(1))
        self.generator = torch.Generator().manual_seed(2)
        self.order: list[int] = []
        self.position = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not 0 < self.position < BATCHES:
            self.order, self.position = torch.randperm(len(self.data), generator=self.generator).tolist(), 0
        while self.position < BATCHES:
            chosen = self.order[self.position * 4 : self.position * 4 + 4]
            self.position += 1
            yield self.data[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = list(state["order"]), state["position"]
        self.generator.set_state(state["generator"])


class Model(lightning.LightningModule):
    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, 1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("tested", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(
    folder: Path,
    plugins: list[Any],
    *,
    epochs: int = 4,
    ckpt_path: Any = None,
    checkpoints: ModelCheckpoint | None = None,
    callbacks: tuple[Any, ...] = (),
    model: Model | None = None,
    **options: Any,
) -> tuple[Model, lightning.Trainer]:
    """Train in ``folder``, and return the trained model and its trainer."""
    torch.manual_seed(0)
    model = model or Model()
    chosen = checkpoints or ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        plugins=plugins,
        callbacks=[chosen, *callbacks],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, ShuffledLoader(), ckpt_path=ckpt_path)
    return model, trainer
