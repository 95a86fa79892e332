"""Saves that take files over from the checkpoint before, and what they share with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits

from asyncckpt import Checkpointer, Run, SaveReport

KINDS = list(itertools.product(["safetensors", "zarr"], ["none", "planes"]))
kinds = pytest.mark.parametrize(("shard_format", "codec"), KINDS, ids=str)
#: Of a checkpoint without a change: the metadata and the manifest.
SMALL_BYTES = 64 << 10


def some_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "same": torch.randn(100_000, generator=generator),
        "big": torch.randn(400, 512, generator=generator),
        "tiny": torch.arange(9),
        "plain": {"lr": 0.1},
    }


def files_of(path: str | Path) -> dict[str, Path]:
    root = Path(path)
    return {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}


def data_files(path: str | Path) -> dict[str, Path]:
    small = ("manifest.json", "state.json", "zarr.json", ".index.json")
    return {name: file for name, file in files_of(path).items() if not name.endswith(small)}


def shared_files(run: Checkpointer, old: str, new: str) -> set[str]:
    """The data files that two checkpoints share, by name. Where files share blocks instead, all of equal content."""
    before, after = data_files(old), data_files(new)
    names = before.keys() & after.keys()
    if run._store.reflinks:
        return {name for name in names if before[name].read_bytes() == after[name].read_bytes()}
    return {name for name in names if before[name].samefile(after[name])}


def component_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else name.rpartition("-of-")[0].rpartition("-")[0]


def save_and_wait(run: Checkpointer, step: int, state: dict[str, Any], **options: Any) -> SaveReport:
    """Save, and wait until the next save can build on it."""
    report = run.save(step, state, **options).result()
    run.wait()
    return report


def assert_holds(path: str | Path, step: int, state: dict[str, Any]) -> None:
    """The checkpoint verifies, and holds exactly ``state``."""
    run = Run(path)
    assert run.verify(step) == []
    live = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else type(value)()
        for name, value in state.items()
    }
    run.restore(live, step)
    assert bits(live) == bits(state)


def one_long_tensor() -> dict[str, Any]:
    return {"w": torch.randn(64 * 4096, generator=torch.Generator().manual_seed(4)), "n": torch.arange(3)}
