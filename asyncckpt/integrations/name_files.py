"""A small text file stands where a trainer looks for its own, and says which checkpoint of which run is meant: torch
refuses it at once, and nothing is ever read in part."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from asyncckpt.errors import RunPathError

_VERSION = 1
_MOST_BYTES = 4096


def name_text(kind: str, about: str, **names: str) -> bytes:
    """Return the bytes of such a file. ``kind``: what it begins with; ``about``: what a person who opens it should
    know; ``names``: ``run``, the folder of the run, and whatever else finds the checkpoint."""
    return (json.dumps({kind: _VERSION, **names, "about": about}) + "\n").encode()


def read_names(path: Path, kind: str, keys: Sequence[str]) -> list[str] | None:
    """Return what a file of this ``kind`` has for ``keys``, whatever links lead to it; None for any other file, for a
    directory, and where there is nothing. Blocks on the disk. Raises ``RunPathError`` for one that is damaged, names a
    run outside its directory, or is of a version that is unknown."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    if not data.startswith(f'{{"{kind}": '.encode()):
        return None
    try:
        fields = json.loads(data)
        version, run, found = fields[kind], fields["run"], [fields[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise RunPathError(f"{path}: this pointer to a checkpoint is damaged; look for its run beside it") from error
    if version != _VERSION or not all(type(one) is str for one in (run, *found)) or run != os.path.basename(run):
        raise RunPathError(f"{path}: this pointer to a checkpoint is of another version; update asyncckpt")
    return found
