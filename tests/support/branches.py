"""Runs whose checkpoints hold one number each, which says what they were saved with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from asyncckpt import Checkpointer, Run
from support.options import by_stage


def state(value: int) -> dict[str, Any]:
    return {"w": torch.full((700,), value), "meta": {"value": value}}


def saved(path: Path, *steps: int, **options: Any) -> None:
    with Checkpointer(path, **by_stage(**options)) as run:
        for step in steps:
            run.save(step, state(step)).result()


def steps(path: Path) -> list[int]:
    return [entry.step for entry in Run(path).ls()]


def value(path: Path, step: int | None = None) -> int:
    """What a checkpoint holds, of one piece."""
    found = state(-1)
    Run(path).restore(found, step)
    assert found["w"].tolist() == [found["meta"]["value"]] * 700
    return int(found["meta"]["value"])
