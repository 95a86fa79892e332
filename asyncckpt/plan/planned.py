"""The plan of one save: the layout, the pieces, and what this rank does of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncckpt.types import ComponentSnapshot, Layout, Piece, Snapshot


@dataclass(frozen=True, slots=True)
class Planned:
    """A save of this rank: its pieces, the layout of its part (all shared shards with its own extents, then the shards
    of the components that are its own), and all components under the names they are stored under, those of other ranks
    empty. ``own``: component → the name this rank's own is stored under. ``leads``: see ``Agreed``."""

    step: int
    pieces: list[Piece]
    layout: Layout
    components: Sequence[ComponentSnapshot]
    own: Mapping[str, str]
    leads: frozenset[str]


def alone(snapshot: Snapshot, layout: Layout) -> Planned:
    """The plan of a process that saves by itself."""
    return Planned(snapshot.step, snapshot.pieces(), layout, snapshot.components, {}, frozenset())
