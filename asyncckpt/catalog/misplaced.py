"""Recognises a path that is one level too deep: it is a checkpoint, and a run directory was asked for."""

from __future__ import annotations

import os
import re
from typing import Final

from asyncckpt.errors import AsyncCkptError, RunPathError
from asyncckpt.manifest.json import FILE_NAME, STATE_FILE
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Store
from asyncckpt.types import ALIGNMENT_BYTES

#: Every manifest that this library wrote begins so; others' files of that name do not.
_BEGIN: Final = b'{"format":"asyncckpt"'
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.")


def refuse_checkpoint(store: Store) -> None:
    """Raise ``RunPathError``, with the way out, where the store's directory is a checkpoint itself. Does nothing where
    there is no such directory. Blocks on the disk; changes nothing."""
    if is_checkpoint(store):
        parent, name = os.path.split(store.address.rstrip("/"))
        raise RunPathError(
            f"{store.address} is a checkpoint, and the path of a run was asked for: the directory that holds its "
            f"checkpoints. Give {parent}; to use this very checkpoint ({name}), call restore(state, step=…) on that "
            f"run, or name its step on the command line"
        )


def is_checkpoint(store: Store) -> bool:
    """Return whether the store's directory is a checkpoint, damaged or not. Blocks on the disk."""
    here = store.listing("")
    manifest = here.get(FILE_NAME)
    if manifest is None or manifest.kind != "file":
        return False
    if STATE_FILE in here and any(_SHARD.search(name) for name in here):
        return True
    try:
        reader = store.open("")
    except (AsyncCkptError, OSError):
        return STATE_FILE in here  # a bucket opens nothing but what has a name
    try:
        head = memoryview(aligned_buffer(ALIGNMENT_BYTES))
        got = reader.read_into(FILE_NAME, head, min(ALIGNMENT_BYTES, manifest.nbytes), 0)
        return bytes(head[: min(got, len(_BEGIN))]) == _BEGIN
    except (AsyncCkptError, OSError):
        return STATE_FILE in here
    finally:
        reader.close()
