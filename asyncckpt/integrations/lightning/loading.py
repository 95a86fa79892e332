"""Reads checkpoints back as the dictionaries that Lightning has saved."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, NoUsableCheckpoint
from asyncckpt.integrations.lightning.pointer import Pointer, read_pointer
from asyncckpt.integrations.lightning.translation import from_components
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.restore.load import load
from asyncckpt.run import Run

log = logging.getLogger("asyncckpt")


def is_run(path: Path) -> bool:
    """Whether this directory is a run, by its checkpoints."""
    return path.is_dir() and any(entry.kind == "full" for entry in Run(path).ls())


def load_newest(path: Path, device: str | torch.device) -> dict[str, Any]:
    """Return the newest checkpoint of a run that verifies. One that is damaged is skipped with a warning. Raises
    ``NoUsableCheckpoint``."""
    run = Run(path)
    for entry in reversed([one for one in run.ls() if one.kind == "full" and not one.renamed]):
        try:
            with run.open_entry(entry) as checkpoint:
                return from_components(load(checkpoint, None, None, device=device), checkpoint.path)
        except (CheckpointDamaged, CheckpointNotFound) as error:
            log.warning("%s: %s cannot be used, the checkpoint before is tried: %s", path, entry.name, error)
    raise NoUsableCheckpoint(f"{path}: none of its checkpoints can be used; see `asyncckpt verify {path} --all`")


def load_pointed(path: Path, pointer: Pointer, device: str | torch.device) -> dict[str, Any]:
    """Return the checkpoint that the pointer in the file ``path`` means. Where a ``last*.ckpt`` means one that was not
    finished, it is the newest before it. Raises ``CheckpointNotFound``, ``CheckpointDamaged``."""
    folder = Path(os.path.realpath(path)).parent / pointer.run
    run = Run(folder)
    try:
        return from_components(run.load(pointer.name, device=device), str(path))
    except CheckpointNotFound as error:
        if not is_last(path):
            raise _not_finished(path, folder) from error
    newest = run.newest()
    log.warning("%s: its last save was not finished; the newest that was, %s, is used", path, newest.name)
    return from_components(run.load(device=device), str(path))


@dataclass(frozen=True, slots=True)
class Saved:
    """Says what a ``ckpt_path`` of Lightning's means. ``run``: the run's directory. ``name``: that of the checkpoint;
    None for the newest that verifies. ``kinds``: by component, how it was saved, of the newest that can be opened."""

    run: str
    name: str | None
    kinds: Mapping[str, str]


def find_saved(path: Path) -> Saved | None:
    """Return what ``path`` means; None where it is nothing of ours. Where a ``last*.ckpt`` means a checkpoint that was
    not finished, it is the newest. Blocks on the disk. Raises ``CheckpointNotFound``, ``CheckpointDamaged``,
    ``RunPathError``."""
    if is_run(path):
        return Saved(str(path), None, _newest_kinds(Run(path)))
    pointer = read_pointer(path)
    if pointer is None:
        return None
    folder = Path(os.path.realpath(path)).parent / pointer.run
    run = Run(folder)
    try:
        with run.open(pointer.name) as checkpoint:
            return Saved(str(folder), pointer.name, _kinds(checkpoint))
    except CheckpointNotFound as error:
        if not is_last(path):
            raise _not_finished(path, folder) from error
    log.warning("%s: its last save was not finished; the newest that was is used", path)
    return Saved(str(folder), None, _newest_kinds(run))


def _kinds(checkpoint: OpenCheckpoint) -> dict[str, str]:
    return {name: record.kind for name, record in checkpoint.manifest.components.items()}


def _newest_kinds(run: Run) -> dict[str, str]:
    for entry in reversed([one for one in run.ls() if one.kind == "full" and not one.renamed]):
        with contextlib.suppress(CheckpointDamaged, CheckpointNotFound), run.open_entry(entry) as checkpoint:
            return _kinds(checkpoint)
    return {}


def is_last(path: Path) -> bool:
    """Whether Lightning means the newest checkpoint by this file."""
    return path.name.startswith("last")


def _not_finished(path: Path, folder: Path) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"{path}: the checkpoint that this file names is not in {folder}: its save was not finished, or its folder was "
        f"left behind. Resume with ckpt_path='last', or see `asyncckpt ls {folder}`"
    )
