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
from frameworks.on_ranks import on_ranks
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


def test_killed_in_the_middle_of_saves_it_resumes_and_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    def write(folder: Path, seed: int) -> None:
        torch.save(train(folder / "run", seed=seed), folder / "end.pt")

    plain = Training()
    plain.run()
    (tmp_path / "whole").mkdir()
    _, calls = in_child(lambda: write(tmp_path / "whole", 0))
    chosen = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.Random(os.urandom(8)).randrange(1 << 30)
    for point in random.Random(chosen).sample(range(2, calls), 6):
        folder = tmp_path / f"killed-{point}"
        folder.mkdir()
        killed, _ = in_child(lambda folder=folder: write(folder, 0), point)  # type: ignore[misc]
        assert killed
        in_child(lambda folder=folder: write(folder, 0))  # type: ignore[misc]
        assert torch.load(folder / "end.pt") == plain.end(), f"killed at call {point} of {calls}, seed {chosen}"


def test_plain_accelerates_checkpoint_goes_on_with_ours(tmp_path: Path) -> None:
    unbroken = Training()
    unbroken.run()
    first = Training()
    first.run(last=2 * BATCHES)
    first.accelerator.save_state(str(tmp_path / "plain"))
    then = Training(seed=4)
    # Accelerate leaves the seed of the order out unless it is given
    then.loader.get_sampler().initial_seed = first.loader.get_sampler().initial_seed
    then.accelerator.load_state(str(tmp_path / "plain"))
    with AsyncState(then.accelerator, tmp_path / "run") as state:
        state.save_state(2 * BATCHES)
    last = Training(seed=5)
    with AsyncState(last.accelerator, tmp_path / "run") as state:
        last.run(state.load_state())
    assert last.end() == unbroken.end()


def test_plain_accelerate_refuses_ours_as_it_is_and_goes_on_with_an_export(tmp_path: Path) -> None:
    unbroken = Training()
    unbroken.run()
    train(tmp_path / "run", last=2 * BATCHES)
    plain = Training(seed=4)
    with pytest.raises(FileNotFoundError):
        plain.accelerator.load_state(str(tmp_path / "run" / f"step-{2 * BATCHES:08d}"))
    exporting = Training(seed=5)
    with AsyncState(exporting.accelerator, tmp_path / "run") as state:
        state.export(tmp_path / "exported")
    plain.accelerator.load_state(str(tmp_path / "exported"))
    plain.loader.get_sampler().initial_seed = unbroken.loader.get_sampler().initial_seed
    plain.run(2 * BATCHES)
    assert plain.end() == unbroken.end()


def test_steps_are_counted_where_none_is_given_and_names_are_found(tmp_path: Path) -> None:
    training = Training()
    with AsyncState(training.accelerator, tmp_path / "run", keep=asyncckpt.KeepLast(2)) as state:
        assert state.load_state() == 0
        for name in ("a", "b", "c"):
            training.run(last=2)
            state.save_state(name=f"{name}1")
        state.wait()
        assert state.load_state("b1") == 2
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [2, 3]


def test_folder_that_accelerate_counts_and_deletes_is_refused(tmp_path: Path) -> None:
    configuration = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)
    training = Training(project_config=configuration)
    with pytest.raises(asyncckpt.InvalidOption, match="automatic_checkpoint_naming"):
        AsyncState(training.accelerator, tmp_path / "checkpoints" / "run")


def test_hooks_that_write_files_of_their_own_are_refused(tmp_path: Path) -> None:
    training = Training()
    training.accelerator.register_save_state_pre_hook(lambda models, weights, folder: None)
    with AsyncState(training.accelerator, tmp_path / "run") as state, pytest.raises(asyncckpt.InvalidOption):
        state.save_state(1)


def test_scaler_comes_back(tmp_path: Path) -> None:
    scales = []
    for scale in (1024.0, 2.0):
        training = Training()
        training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        training.accelerator.scaler._lazy_init_scale_growth_tracker("cpu")
        with AsyncState(training.accelerator, tmp_path / "run") as state:
            state.load_state()
            scales.append(training.accelerator.scaler.get_scale())
            if scale == 1024.0:
                state.save_state(1)
    assert scales == [1024.0, 1024.0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_stopped_end_as_those_that_did_not(kind: str, tmp_path: Path) -> None:
    """And plain Accelerate opens an export of theirs."""
    assert on_ranks("accelerate_on_ranks.py", tmp_path, kind) == [[True, True]] * 2
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "ours").ls()] == [5, 10, 15, 20]
