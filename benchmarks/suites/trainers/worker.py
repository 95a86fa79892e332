"""Trains in one framework, with its own saves, with ours, or with none, and prints what each save and each step took.

python -m benchmarks.suites.trainers.worker FRAMEWORK KIND DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.raw import Ceiling

LAYERS = 8
BATCH = 64


class Model(nn.Module):
    """Has as many parameters as eight square layers have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(x).square().mean()}


class Clock:
    """Takes the time of each step, and of each save within it."""

    def __init__(self) -> None:
        self.stalls: list[float] = []
        self.steps: list[float] = []
        self._stalled = 0.0
        self._before: float | None = None

    def timed(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``save`` with its time taken."""

        def timing(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return save(*arguments, **options)
            finally:
                took = time.perf_counter() - began
                self.stalls.append(took)
                self._stalled += took

        return timing

    def step(self) -> None:
        """Take note that a step has begun: the one before has ended."""
        now = time.perf_counter()
        if self._before is not None:
            self.steps.append(now - self._before - self._stalled)
        self._before, self._stalled = now, 0.0


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Has as many rows as are asked for."""

    def __init__(self, width: int, rows: int) -> None:
        self.width, self.rows = width, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((self.width,), index / self.rows)}


def with_transformers(kind: str, width: int, steps: int, every: int, out: Path, clock: Clock) -> None:
    """Train with the Trainer of Transformers."""
    import transformers

    from asyncckpt.integrations.transformers import AsyncCheckpointMixin

    class Timed(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.step()

    bases = (AsyncCheckpointMixin, transformers.Trainer) if kind == "ours" else (transformers.Trainer,)
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=steps,
        save_strategy="no" if kind == "none" else "steps",
        save_steps=every,
        save_total_limit=2,
        per_device_train_batch_size=BATCH,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = type("Kind", bases, {})(
        model=Model(width), args=arguments, train_dataset=Rows(width, BATCH * steps), callbacks=[Timed()]
    )
    trainer._save_checkpoint = clock.timed(trainer._save_checkpoint)
    trainer.train()


def with_accelerate(kind: str, width: int, steps: int, every: int, out: Path, clock: Clock) -> None:
    """Train in a loop with Accelerate."""
    import contextlib

    from accelerate import Accelerator

    import asyncckpt
    from asyncckpt.integrations.accelerate import AsyncState

    accelerator = Accelerator(cpu=True)
    net = Model(width)
    loader = torch.utils.data.DataLoader(Rows(width, BATCH * steps), BATCH)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters()), loader)
    with contextlib.ExitStack() as stack:
        if kind == "ours":
            state = stack.enter_context(AsyncState(accelerator, out / "run", keep=asyncckpt.KeepLast(2)))
            save = clock.timed(state.save_state)
        else:
            save = clock.timed(lambda step: accelerator.save_state(str(out / str(step // every % 2))))
        for number, batch in enumerate(loader, 1):
            clock.step()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            if kind != "none" and number % every == 0:
                save(number)


def with_lightning(kind: str, width: int, steps: int, every: int, out: Path, clock: Clock) -> None:
    """Train with Lightning."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from asyncckpt.integrations.lightning import AsyncckptIO

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(width)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            clock.step()
            loss: torch.Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    saving = ModelCheckpoint(dirpath=out, every_n_train_steps=every, save_top_k=1)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kind != "none",
        callbacks=[] if kind == "none" else [saving],
        plugins=[AsyncckptIO()] if kind == "ours" else [],
    )
    trainer.save_checkpoint = clock.timed(trainer.save_checkpoint)  # type: ignore[method-assign]
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(width, BATCH * steps), BATCH))


FRAMEWORKS: dict[str, Callable[..., None]] = {
    "transformers": with_transformers,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
}
KINDS = ("none", "plain", "ours")


def state_bytes(width: int) -> int:
    """Return the size of the weights and of AdamW's moments, in bytes."""
    return 3 * 4 * LAYERS * width * (width + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=[*FRAMEWORKS, "raw"])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--width", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=65)
    parser.add_argument("--every", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="asyncckpt-trainers-", dir=given.directory) as folder:
        if given.framework == "raw":
            ceiling = Ceiling([torch.zeros(state_bytes(given.width) // 4)], folder)
            found: dict[str, Any] = {"copies": [ceiling.copy() for _ in range(3)]}
            found["writes"] = [ceiling.write() for _ in range(3)]
        else:
            clock = Clock()
            torch.manual_seed(0)
            began = time.perf_counter()
            run = FRAMEWORKS[given.framework]
            run(given.kind, given.width, given.steps, given.every, Path(folder) / "out", clock)
            found = {"stalls": clock.stalls, "steps": clock.steps, "seconds": time.perf_counter() - began}
    print(json.dumps({"framework": given.framework, "kind": given.kind, **found}))


if __name__ == "__main__":
    main()
