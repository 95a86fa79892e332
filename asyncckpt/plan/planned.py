"""``Planned`` is the plan of one save as one rank sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncckpt.types import ComponentSnapshot, Layout, LocalTensor, Snapshot


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of one save on this rank. ``layout``: all shared shards, with the extents that this rank writes, then
    the shards of its own components. ``pieces``: this rank's. ``components``: all, under the names that they are stored
    under, those that only other ranks hold empty. ``rank_local_names``: component → the name that this rank's own is
    stored under.
    ``sends_values_of``: see ``AgreedPlan``. ``met``: all ranks have met to plan this very save."""

    step: int
    pieces: list[LocalTensor]
    layout: Layout
    components: Sequence[ComponentSnapshot]
    rank_local_names: Mapping[str, str]
    sends_values_of: frozenset[str]
    met: bool = False


def alone(snapshot: Snapshot, layout: Layout) -> Planned:
    """Make the plan of a process that saves by itself."""
    return Planned(snapshot.step, snapshot.pieces(), layout, snapshot.components, {}, frozenset())
