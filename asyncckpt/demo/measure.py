"""``python -m asyncckpt.demo.measure`` compares asyncckpt with ``torch.save`` of the same training state.

One process saves one state with each method in turn, several times, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncckpt import Checkpointer, KeepLast
from asyncckpt.demo.train import Reporter
from asyncckpt.demo.training import Training, count_alike

ASYNC = "asyncckpt, training goes on"
ASYNC_IDLE = "asyncckpt, training waits"
TORCH_FSYNC = "torch.save + fsync"
TORCH = "torch.save"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Holds the figures of one save, in seconds. ``durable_seconds`` is None where nothing makes the save durable."""

    stall_seconds: float
    durable_seconds: float | None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    options = parser.parse_args()

    reporter = Reporter()
    count_alike()
    training = Training(options.corpus, seed=1, total_steps=1000)
    training.step()
    file = options.directory / "torch.pt"
    with Checkpointer(options.directory / "asyncckpt", keep=KeepLast(1)) as checkpointer:
        checkpointer.watch(training.optimizer)
        checkpointer.prepare(training.state)
        methods: dict[str, Callable[[int], Measured]] = {
            ASYNC: lambda number: _deferred(checkpointer, training, 2 * number),
            TORCH_FSYNC: lambda _: _torch_save(training, file, sync=True),
            ASYNC_IDLE: lambda number: _paused(checkpointer, training, 2 * number + 1),
            TORCH: lambda _: _torch_save(training, file, sync=False),
        }
        for number in range(options.rounds + 1):
            for method, measure in methods.items():
                measured = measure(number)
                _settle(file)
                if number > 0:  # the first round warms up memory, the arena and the file system
                    nbytes = checkpointer.ls()[-1].nbytes
                    reporter.report(
                        "Measured",
                        method=method,
                        stall_seconds=measured.stall_seconds,
                        durable_seconds=measured.durable_seconds,
                        nbytes=nbytes,
                    )


def _deferred(checkpointer: Checkpointer, training: Training, step: int) -> Measured:
    """Save as a training loop does: the next steps run while the save becomes durable."""
    began = time.perf_counter()
    durable: list[float] = []
    pending = checkpointer.save(step, training.state)
    pending.add_done_callback(lambda _: durable.append(time.perf_counter() - began))  # a step may end much later
    while not pending.done():
        training.step()
    report = pending.result()
    checkpointer.wait()  # the callback, which runs on another thread, is done after this
    return Measured(stall_seconds=report.stall_seconds, durable_seconds=durable[0])


def _paused(checkpointer: Checkpointer, training: Training, step: int) -> Measured:
    """Save and wait until the save is durable, as ``torch.save`` does; the whole time counts as a stall."""
    began = time.perf_counter()
    checkpointer.save(step, training.state).result()
    seconds = time.perf_counter() - began
    return Measured(stall_seconds=seconds, durable_seconds=seconds)


def _torch_save(training: Training, file: Path, *, sync: bool) -> Measured:
    file.unlink(missing_ok=True)
    began = time.perf_counter()
    state: dict[str, Any] = {name: value.state_dict() for name, value in training.state.items()}
    torch.save(state, file)
    if sync:
        _fsync(file)
        _fsync(file.parent)
    seconds = time.perf_counter() - began
    return Measured(stall_seconds=seconds, durable_seconds=seconds if sync else None)


def _settle(file: Path) -> None:
    """Write back what a method left in the page cache, so that the next one does not pay for it."""
    if file.exists():
        _fsync(file)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
