"""Reads a file of a tag back as what DeepSpeed has saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound
from asyncckpt.integrations.deepspeed.tags import Place, read_place
from asyncckpt.integrations.deepspeed.values import from_plain, safe_classes
from asyncckpt.restore.load import load
from asyncckpt.run import Run


def component_of(name: str) -> str:
    """Return what the component of a file is called."""
    return name.removesuffix(".pt")


def load_file(path: Path, map_location: Any) -> Any:
    """Return what was saved as the file ``path`` of a tag. ``map_location``: a device, or anything else for host
    memory. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` and ``RunPathError``."""
    place = read_place(path)
    if place is None:
        with torch.serialization.safe_globals(safe_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)
    device = map_location if isinstance(map_location, str | torch.device) else "cpu"
    return load_stored(place, path, device)


def load_stored(place: Place, path: str | os.PathLike[str], device: str | torch.device) -> Any:
    """Return what was saved as the file that lies at ``place``. ``path``: what to call it in errors."""
    run = Run(place.run)
    try:
        opened = run.open(place.tag)
    except CheckpointNotFound as error:
        raise CheckpointNotFound(
            f"{path}: the checkpoint that this file names is not in {place.run}: retention has deleted it, or its "
            f"folder was left behind. See `asyncckpt ls {place.run}`"
        ) from error
    with opened as checkpoint:
        wanted = re.compile(re.escape(component_of(place.name)) + r"(?:\+[0-9]+)?\Z")
        found = [name for name in checkpoint.manifest.components if wanted.match(name)]
        if len(found) != 1:
            raise CheckpointDamaged(f"{path}: checkpoint {checkpoint.path} has {len(found)} components of this file")
        return from_plain(load(checkpoint, found[0], None, device=device), str(path))
