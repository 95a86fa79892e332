"""Two checkpoints are compared bit for bit: both are restored into live objects, and those are compared."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncckpt.demo.training import Training
from asyncckpt.run import Run
from asyncckpt.state.rng import RngState


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Says of one component how many values and bytes were compared, and names the values that differ."""

    component: str
    values: int
    nbytes: int
    different: tuple[str, ...]


def compare(one: Path, other: Path, step: int, corpus: Path, total_steps: int) -> list[Comparison]:
    """Compare checkpoint ``step`` of two runs, component by component. Raises what ``Run.restore`` raises."""
    left, right = (_restored(run, step, corpus, total_steps, seed) for seed, run in ((3, one), (4, other)))
    comparisons = []
    for component in left:
        mine, yours = left[component], right[component]
        names = mine.keys() | yours.keys()
        comparisons.append(
            Comparison(
                component=component,
                values=len(names),
                nbytes=sum(len(value) for value in mine.values()),
                different=tuple(sorted(name for name in names if mine.get(name) != yours.get(name))),
            )
        )
    return comparisons


def _restored(run: Path, step: int, corpus: Path, total_steps: int, seed: int) -> dict[str, dict[str, bytes]]:
    """Restore a step, and return every value's bits by component and path. The seeds of the two runs differ, so a value
    that a restore leaves out differs too."""
    rng = RngState()
    before = rng.state_dict()
    try:
        training = Training(corpus, seed=seed, total_steps=total_steps)
        Run(run).restore(training.state, step)
        return {name: dict(_bits(value.state_dict(), "")) for name, value in training.state.items()}
    finally:
        rng.load_state_dict(before)  # the caller goes on with this process's random numbers


def _bits(value: Any, path: str) -> Iterator[tuple[str, bytes]]:
    match value:
        case torch.Tensor():
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            yield path, f"{value.dtype} {tuple(value.shape)} ".encode() + raw
        case dict():
            for key, item in value.items():
                yield from _bits(item, f"{path}.{key}" if path else str(key))
        case list() | tuple():
            for index, item in enumerate(value):
                yield from _bits(item, f"{path}[{index}]")
        case bytes():
            yield path, b"bytes " + value
        case float():
            yield path, b"float " + struct.pack("<d", value)
        case _:
            yield path, f"{type(value).__name__} {value!r}".encode()
