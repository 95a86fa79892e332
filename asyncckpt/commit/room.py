"""Before anything is written, a save makes sure that the storage has room for it."""

from __future__ import annotations

from collections.abc import Callable

from asyncckpt.errors import NotEnoughSpace
from asyncckpt.protocols import Store


def make_room(store: Store, nbytes: int, step: int, reserved: int, prune: Callable[[], object]) -> None:
    """Make sure that ``nbytes`` are free beside those that other saves have ``reserved``; if they are not, call
    ``prune``, which deletes what retention does not keep. Blocks on the disk. Raises ``NotEnoughSpace``."""
    free = store.free_bytes()
    if free is None or free - reserved >= nbytes:
        return
    prune()
    free = (store.free_bytes() or 0) - reserved
    if free < nbytes:
        raise NotEnoughSpace(
            f"step {step}: {store.address} has {max(free, 0)} bytes free and the save needs {nbytes}. "
            f"Nothing was written; free space, keep fewer checkpoints, or save elsewhere"
        )
