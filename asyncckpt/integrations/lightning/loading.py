"""Reads checkpoints back as the dictionaries that Lightning has saved."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, NoUsableCheckpoint
from asyncckpt.integrations.lightning.pointer import Pointer
from asyncckpt.integrations.lightning.translation import from_components
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
        if not path.name.startswith("last"):
            raise CheckpointNotFound(
                f"{path}: the checkpoint that this file names is not in {folder}: its save was not finished, or its "
                f"folder was left behind. Resume with ckpt_path='last', or see `asyncckpt ls {folder}`"
            ) from error
    newest = run.newest()
    log.warning("%s: its last save was not finished; the newest that was, %s, is used", path, newest.name)
    return from_components(run.load(device=device), str(path))
