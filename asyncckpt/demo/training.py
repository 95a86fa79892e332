"""The training run of the demo is made here, with one step of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from asyncckpt.demo.data import TextLoader
from asyncckpt.demo.gpt import VOCABULARY, Gpt, GptOptions
from asyncckpt.state.rng import RngState

#: Every process of the demo computes with one thread: another number would add floats in another order.
THREADS = 1
_BATCH = 4
_WARMUP_STEPS = 10
_LEARNING_RATE = 1e-3


def count_alike() -> None:
    """Change settings of the whole process so that equal steps give equal bits. Call this once, before the first
    step."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)


class Losses:
    """Keeps the losses as a component, so that their history is resumed and compared like everything else."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = list(state["values"])


class Training:
    """Holds model, optimizer, schedule, data and random numbers of one run; ``state`` is what a checkpoint takes.

    ``seed`` decides everything that a checkpoint does not bring back.
    """

    def __init__(self, corpus: Path, *, seed: int, total_steps: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        options = GptOptions()
        self.model = Gpt(options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warmup_then_cosine(total_steps))
        self.loader = TextLoader(corpus, batch=_BATCH, context=options.context, seed=seed)
        self.losses = Losses()
        self._batches = iter(self.loader)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "losses": self.losses,
            "rng": RngState(),
        }

    def step(self) -> tuple[float, list[float]]:
        """Take one step; return its loss, and the times at which forward, backward and update began and the update
        ended."""
        marks = [time.perf_counter()]
        inputs, targets = next(self._batches)
        loss = functional.cross_entropy(self.model(inputs).view(-1, VOCABULARY), targets.view(-1))
        marks.append(time.perf_counter())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.scheduler.step()
        marks.append(time.perf_counter())
        value = loss.item()
        self.losses.values.append(value)
        return value, marks


def _warmup_then_cosine(total_steps: int) -> Any:
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / _WARMUP_STEPS)
        return warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total_steps)))

    return factor
