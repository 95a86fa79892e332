"""Accelerate's state is saved and loaded through asyncckpt as it is by Accelerate itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from conftest import bits
from frameworks.killing import in_child
from torch import nn
from torch.utils.data import DataLoader

import asyncckpt
from asyncckpt.integrations.accelerate import AsyncState

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]

BATCHES = 6


class Counter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.seen = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Training:
    """Two models with an optimizer each, a schedule, dropout, shuffled data, accumulated gradients."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=2,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
            **options,
        )
        models = [nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)), nn.Linear(4, 1)]
        optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in models]
        schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 2, 0.8)
        data = torch.randn(BATCHES * 4, 4, generator=torch.Generator().manual_seed(1))
        prepared = self.accelerator.prepare(*models, *optimizers, schedule, DataLoader(data, 4, shuffle=True))
        self.models, self.optimizers, self.schedule, self.loader = prepared[:2], prepared[2:4], prepared[4], prepared[5]
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def run(
        self,
        first: int = 0,
        last: int = 4 * BATCHES,
        after_batch: Callable[[int], Any] = lambda step: None,
        skip: Any = None,
    ) -> None:
        """Train from the batch ``first``, counted over all epochs, to before ``last``."""
        step = first
        while step < last:
            epoch, skipped = divmod(step, BATCHES)
            self.loader.set_epoch(epoch)
            loader = (skip or self.accelerator.skip_first_batches)(self.loader, skipped) if skipped else self.loader
            for batch in loader:
                with self.accelerator.accumulate(*self.models):
                    loss = sum(model(batch).square().mean() for model in self.models)
                    self.accelerator.backward(loss)
                    for optimizer in self.optimizers:
                        optimizer.step()
                    self.schedule.step()
                    for optimizer in self.optimizers:
                        optimizer.zero_grad()
                self.counter.seen += float(loss)
                step += 1
                after_batch(step)
                if step == last:
                    return

    def end(self) -> Any:
        return bits([[m.state_dict() for m in self.models], self.schedule.state_dict(), self.counter.seen])


def train(path: Path, last: int = 4 * BATCHES, seed: int = 0, every: int = 4) -> Any:
    training = Training(seed)
    with AsyncState(training.accelerator, path) as state:
        first = state.load_state()
        training.run(
            first, last, lambda step: state.save_state(step) if step % every == 0 else None, state.skip_first_batches
        )
    return training.end()


def test_resumed_training_ends_as_the_unbroken_one_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    plain = Training()
    plain.run()
    train(tmp_path / "run", last=10)
    assert train(tmp_path / "run", seed=5) == plain.end()
