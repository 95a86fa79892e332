"""Makes files of plain Lightning from checkpoints, and models that Lightning's own ``load_from_checkpoint`` cannot."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from asyncckpt.errors import RunPathError
from asyncckpt.integrations.lightning.plugin import AsyncckptIO
from asyncckpt.integrations.whole_files import write_whole


def export(path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the checkpoint that ``path`` means (a ``.ckpt`` of ``AsyncckptIO``, or a run) to ``out``, a file that plain
    Lightning resumes from and that ``load_from_checkpoint`` takes.

    Every byte that is read is verified. The file appears whole or not at all, fsynced; ``overwrite`` replaces one that
    is there. Blocks, and holds the checkpoint in memory. Raises ``RunPathError`` and as ``load_checkpoint`` does."""
    target = Path(out)
    if os.path.lexists(target) and not overwrite:
        raise RunPathError(f"{target} exists; choose another name, or overwrite it (overwrite=True)")
    checkpoint = AsyncckptIO().load_checkpoint(path)
    write_whole(target, lambda file: torch.save(checkpoint, file), durable=True)


def load_from_checkpoint(cls: Any, path: str | os.PathLike[str], **options: Any) -> Any:
    """Return what ``cls.load_from_checkpoint(path, **options)`` would, for a checkpoint of ``AsyncckptIO``: Lightning's
    own method reads the file past any plugin. ``cls``: a ``LightningModule`` or ``LightningDataModule``."""
    buffer = io.BytesIO()
    torch.save(AsyncckptIO().load_checkpoint(path), buffer)
    buffer.seek(0)
    return cls.load_from_checkpoint(buffer, weights_only=False, **options)
