"""The configuration that was recorded with a checkpoint is read."""

from __future__ import annotations

from typing import Any, NoReturn

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, StateMismatch
from asyncckpt.read.opening import OpenCheckpoint


def read_config(checkpoint: OpenCheckpoint, like: Any) -> Any:
    """Return the ``config`` of a checkpoint, in the types of ``like``. Raises ``StateMismatch`` where it has others,
    and ``CheckpointDamaged``."""

    def refuse(name: str) -> NoReturn:
        raise CheckpointDamaged(f"{checkpoint.path}: config refers to the tensor {name!r:.80}")

    live = jsontree.Live(like)
    found = jsontree.decode(checkpoint.manifest.config, refuse, live=live)
    if live.mismatched:
        problems = [f"config{problem}" for problem in live.mismatched]
        raise StateMismatch(
            f"{checkpoint.path}: the config that was recorded does not fit like=: {'; '.join(problems[:20])}. Without "
            f"like= it is plain data",
            (),
            (),
            problems,
        )
    return found
