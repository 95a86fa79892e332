"""``Planned`` is the plan of one save as one rank sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asyncckpt.plan.partition import SpreadTensors
from asyncckpt.state.known_state import KnownState, Recaptured
from asyncckpt.state.known_states import Captured
from asyncckpt.types import ComponentSnapshot, Layout, LocalTensor, RowOwners, TensorSpec


@dataclass(frozen=True, slots=True)
class ReplicatedTensor:
    """A tensor of which several ranks hold equal copies, or equal copies of parts. ``rows``: which, and who. ``local``:
    its index among this rank's pieces, -1 where it is not here."""

    component: str
    spec: TensorSpec
    rows: RowOwners
    local: int

    def name(self, part: int) -> str:
        """Return the qualified name, with the rows of the part where the tensor has several."""
        rows = "" if len(self.rows.holders) == 1 else f"[{self.rows.bounds[part]}:{self.rows.bounds[part + 1]}]"
        return f"{self.component}.{self.spec.name}{rows}"

    def part_bytes(self, part: int) -> tuple[int, int]:
        """Return the range of bytes of the whole tensor that a part is."""
        bounds = self.rows.bounds
        width = self.spec.nbytes // bounds[-1] if bounds[-1] else 0
        return bounds[part] * width, bounds[part + 1] * width


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of one save on this rank. ``layout``: all shared shards, with the extents that this rank writes, then
    the shards of its own components. ``pieces``: this rank's. ``components``: all, under the names that they are stored
    under, those that only other ranks hold empty. ``rank_local_names``: component → the name that this rank's own is
    stored under.
    ``sends_values_of``, ``values_like``, ``owners``, ``replicated`` and ``spread``: see ``AgreedPlan``. ``met``: all
    ranks have met to plan this very save. ``known``, ``again``: see ``Captured``."""

    step: int
    pieces: Sequence[LocalTensor]
    layout: Layout
    components: Sequence[ComponentSnapshot]
    rank_local_names: Mapping[str, str]
    sends_values_of: frozenset[str]
    values_like: Mapping[str, int] = field(default_factory=dict)
    owners: Mapping[str, int] = field(default_factory=dict)
    replicated: Sequence[ReplicatedTensor] = ()
    met: bool = False
    known: KnownState | None = None
    again: Recaptured | None = None
    spread: SpreadTensors | None = None


def alone(captured: Captured, layout: Layout) -> Planned:
    """Make the plan of a process that saves by itself."""
    snapshot, again = captured.snapshot, captured.again
    pieces = snapshot.pieces() if again is None else again.pieces
    return Planned(
        *(snapshot.step, pieces, layout, snapshot.components, {}, frozenset()), known=captured.known, again=again
    )
