"""Small files that stand beside a run, where a trainer looks for its own: each appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from asyncckpt.storage.posix import PosixOps


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, durable: bool) -> None:
    """Have ``write`` make a file, which appears whole or not at all, in the place of what is there. ``durable``: so
    that it survives a power loss. Blocks on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        PosixOps().fsync_directory(str(path.parent))
