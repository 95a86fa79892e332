"""Writes DeepSpeed's own files of a tag, for those that open them past a checkpoint engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from asyncckpt.errors import CheckpointNotFound, RunPathError
from asyncckpt.integrations.deepspeed.loading import load_file
from asyncckpt.integrations.deepspeed.tags import LATEST, check_tag
from asyncckpt.integrations.whole_files import write_whole
from asyncckpt.storage.posix import PosixOps


def export(save_dir: str | os.PathLike[str], out: str | os.PathLike[str], tag: str | None = None) -> Path:
    """Write the files that plain DeepSpeed would have saved for a tag into ``out/tag``, with ``latest``, and return
    that directory. ``zero_to_fp32``, ``ds_to_universal`` and plain ``load_checkpoint`` take ``out``. ``tag`` defaults
    to the latest. No process group is needed; blocks on the disk, and holds one file at a time in memory. Raises
    ``CheckpointNotFound``, ``CheckpointDamaged``, and ``RunPathError`` where ``out`` has the tag already."""
    source = Path(save_dir)
    if tag is None:
        try:
            tag = (source / LATEST).read_text().strip()
        except FileNotFoundError as error:
            raise CheckpointNotFound(f"{source}: it has no file {LATEST!r}; say which tag is meant") from error
    check_tag(tag)
    if not (source / tag).is_dir():
        raise CheckpointNotFound(f"{source / tag}: there is no such tag")
    target = Path(out) / tag
    if target.exists():
        raise RunPathError(f"{target} already exists; export into another directory")
    Path(out).mkdir(parents=True, exist_ok=True)
    partly = target.with_name(f".{tag}.{os.getpid()}.tmp")
    partly.mkdir()
    try:
        for name in sorted(os.listdir(source / tag)):
            content = load_file(source / tag / name, "cpu")
            write_whole(partly / name, lambda file, content=content: torch.save(content, file), durable=True)  # type: ignore[misc]
        partly.rename(target)
    except BaseException:
        shutil.rmtree(partly, ignore_errors=True)
        raise
    PosixOps().fsync_directory(os.fspath(out))
    write_whole(Path(out) / LATEST, lambda file: file.write(tag.encode()), durable=True)
    return target
