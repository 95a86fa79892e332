"""Decides which checkpoint of a run is the newest, for every call that reads one and was given no step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.names import step_in
from asyncckpt.errors import AsyncCkptError, NewestDamaged
from asyncckpt.protocols import Store

log = logging.getLogger("asyncckpt")

#: This text file names the full checkpoint that was saved last. It is a hint, never truth.
LATEST = "latest"
#: A longer text in it is none of ours.
_MAX_HINT_BYTES = 1024


def newest(entries: Sequence[CheckpointInfo], kind: str | None = None) -> CheckpointInfo | None:
    """Return the run's own full checkpoint that was saved last, damaged or not; in a run that has no full one, its last
    weights-only one; None where there is none. Pure.

    ``entries``: all checkpoints, the oldest save first. ``kind``: ``full`` or ``weights`` looks at those alone."""
    own = [entry for entry in entries if not entry.renamed and kind in (None, entry.kind)]
    full = [entry for entry in own if entry.kind == "full"]
    return next(reversed(full or own), None)


def refusal(entries: Sequence[CheckpointInfo], entry: CheckpointInfo, problem: object) -> NewestDamaged:
    """Make the error for a newest checkpoint that is damaged: it names the step that would be the newest without it.
    ``problem``: what is wrong, with the path."""
    usable = newest([one for one in entries if one.damage is None and one.name != entry.name])
    way_out = "no other one of this run is usable" if usable is None else f"the newest usable one is {usable.step}"
    error = NewestDamaged(
        f"{str(problem).rstrip('.')}. This is the newest checkpoint, and no older one is read in its place unasked; to "
        f"use an older one, give its step: {way_out}"
    )
    error.usable_step = None if usable is None else usable.step
    return error


def hint(store: Store) -> str:
    """Return the name in the file ``latest``; empty where the storage has none, or shows it to nobody. Blocks."""
    try:
        reader = store.open("")
    except (AsyncCkptError, OSError):
        return ""
    try:
        return reader.read_small(LATEST, _MAX_HINT_BYTES).decode("ascii").strip()
    except (AsyncCkptError, OSError, ValueError):
        return ""
    finally:
        reader.close()


def tell_of_missing(store: Store, path: str, found: CheckpointInfo) -> None:
    """Log where the run has saved a later step than that of the checkpoint that was found to be the newest, and it is
    not there any more: retention deletes no newest one, so somebody else has taken it away."""
    named = hint(store)
    if step_in(named) > found.step and named not in store.names():  # a file and a link are no checkpoints either
        log.warning(
            "%s: the run saved %s last, and that directory is not there any more; the newest checkpoint is that of "
            "step %d",
            path,
            named,
            found.step,
        )
