"""All ranks of a job agree on one layout, and keep it for as long as every rank's names and shapes stay the same.

Each rank describes what it holds. Where all descriptions are equal (DDP, FSDP), only their digests are sent; where
they are not (pipeline stages, experts), each distinct one is sent once, and every rank merges them in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from asyncckpt.errors import UnsupportedValue
from asyncckpt.plan import layout as layouts
from asyncckpt.plan.partition import RankHolding, SpreadTensors, divide
from asyncckpt.plan.per_rank_files import divide_by_rank, suits
from asyncckpt.plan.planned import Planned, ReplicatedTensor
from asyncckpt.protocols import Codec, ShardFormat
from asyncckpt.ranks.store import RankStore
from asyncckpt.ranks.tables import MergedComponent, TableDigest, digest_of, leaders_of, merge_tables, table_of
from asyncckpt.state.rank_names import rank_name
from asyncckpt.types import ComponentSnapshot, Layout, LayoutOptions, LocalTensor, Snapshot


@dataclass(frozen=True, slots=True)
class AgreedPlan:
    """Holds what all ranks have agreed on, as this rank sees it. ``kinds``: the shared components' kinds, by name.
    ``sends_values_of``: the components whose plain values this rank sends: it is the first of the ranks that hold the
    same parts of them. ``redistributed`` and ``gathered``: the indexes, among this rank's shared pieces, of those to
    redistribute and to gather, in the same order on all ranks, the latter each with whether this rank keeps the tensor.
    ``collective``: whether there are such pieces on any rank.

    ``values_like``: component → the first rank that holds the same parts of it as this one, where their plain values
    must be equal. ``owners``: component → the rank whose copies are right. ``replicated``: the tensors of which several
    ranks must hold equal copies, alike on all ranks. ``spread``: see ``Division``."""

    layout: Layout
    kinds: Mapping[str, str]
    sends_values_of: frozenset[str]
    redistributed: Sequence[int]
    gathered: Sequence[tuple[int, bool]]
    collective: bool
    values_like: Mapping[str, int]
    owners: Mapping[str, int]
    replicated: Sequence[ReplicatedTensor]
    spread: SpreadTensors | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A plan, and what each rank had described when it was made."""

    digests: list[dict[str, TableDigest]]
    agreed: AgreedPlan


class JobPlanner:
    """Plans the saves of one rank. Not thread-safe: for the training thread."""

    def __init__(self, ranks: RankStore, shard_format: ShardFormat, codec: Codec, options: LayoutOptions) -> None:
        self._ranks = ranks
        self._format = shard_format
        self._codec = codec
        self._options = options
        #: Pairs of ``plan_key`` and what was agreed. Comparing keys is cheap: their parts are the same objects every
        #: time.
        self._kept: deque[tuple[Any, _Kept]] = deque(maxlen=8)
        #: The latest call in which this rank has told the others all that they wait for before they communicate.
        self._told = ""

    def plan(self, snapshot: Snapshot, key: str, cancel_key: str | None = None, *, gather: bool = True) -> Planned:
        """Plan a save. Where this rank's names or shapes are new, blocks until all ranks have called with the same
        ``key``; ``cancel_key``: see ``RankStore.agree``.

        With ``gather``, tensors that are split by columns are redistributed, and those of a shard that has to be
        written whole are gathered: collectives of the training's own communication, which begin only once all ranks
        have called. Raises ``RanksDisagree``, ``RankLost``, ``PlanChanged``, ``UnsupportedValue``, and what made
        another rank call ``decline``."""
        shared = [component for component in snapshot.components if component.shared]
        agreed, met = self._agreed(shared, key, cancel_key, gather)
        pieces = [piece for component in shared for piece in component.pieces]
        for number in agreed.redistributed if gather else ():
            redistribute = pieces[number].redistribute
            if redistribute is not None:
                pieces[number] = replace(pieces[number], tensor=redistribute(), redistribute=None)
        for number, keep in agreed.gathered if gather else ():
            collect = pieces[number].gather
            if collect is None:
                raise UnsupportedValue(
                    f"tensor {pieces[number].spec.name!r}: a LocalShard cannot be gathered, which this format and "
                    f"codec need; use format='safetensors', codec='none'"
                )
            tensor = collect()  # a collective: on every rank that holds a part
            if keep:
                pieces[number] = LocalTensor(pieces[number].spec, tensor, private=True)
        shards = list(agreed.layout.shards)
        own: dict[str, str] = {}
        components = [ComponentSnapshot(n, kind, [], {}, None) for n, kind in agreed.kinds.items()]
        here = {component.name: component for component in shared}
        components = [here.get(component.name, component) for component in components]
        for component in snapshot.components:
            if not component.shared:
                name = own[component.name] = rank_name(component.name, self._ranks.rank)
                specs = [piece.spec for piece in component.pieces]
                shards += self._format.shards(name, specs, len(pieces), len(shards), self._codec, self._options)
                pieces += component.pieces
                components.append(replace(component, name=name))
        own_bytes = sum(shard.nbytes for shard in shards[len(agreed.layout.shards) :])
        layout = replace(agreed.layout, shards=tuple(shards), nbytes=agreed.layout.nbytes + own_bytes)
        return Planned(
            snapshot.step,
            pieces,
            layout,
            components,
            own,
            agreed.sends_values_of,
            agreed.values_like,
            agreed.owners,
            agreed.replicated,
            met,
            spread=agreed.spread,
        )

    def decline(self, call: str, error: BaseException) -> None:
        """Tell the other ranks that this one failed, with ``error``, before it could plan: none of them waits for it.
        Does nothing where it has planned already, because they may be communicating then. Raises ``RankLost``."""
        if self._told != call:
            self._told = call
            self._ranks.decline(f"plan/{call}", error)

    def is_cached(self, snapshot: Snapshot) -> bool:
        """Whether ``plan`` can do without asking the other ranks."""
        return self._find(plan_key([component for component in snapshot.components if component.shared])) is not None

    def invalidate(self) -> None:
        """Forget all plans: the next save asks the other ranks, whatever it holds."""
        self._kept.clear()

    def _agreed(
        self, shared: Sequence[ComponentSnapshot], call: str, cancel_key: str | None, gather: bool
    ) -> tuple[AgreedPlan, bool]:
        """Return the plan, and whether all ranks have met for it in this call."""
        key = plan_key(shared)
        kept = self._find(key)
        if kept is not None and not (gather and kept.agreed.collective):
            self._told = call
            return kept.agreed, False
        ranks = self._ranks
        tables = {component.name: table_of(component) for component in shared} if kept is None else {}
        mine = (
            {component.name: (component.kind, digest_of(tables[component.name])) for component in shared}
            if kept is None
            else kept.digests[ranks.rank]
        )
        try:
            bodies = ranks.agree("plan", mine, key=f"plan/{call}", cancel_key=cancel_key)
        finally:
            self._told = call
        digests = [{name: (kind, digest) for name, (kind, digest) in body.items()} for body in bodies]
        if kept is None or kept.digests != digests:
            tables = tables or {component.name: table_of(component) for component in shared}
            kept = _Kept(digests, self._agree(shared, tables, digests, call, cancel_key))
            self._kept.append((key, kept))
        return kept.agreed, True

    def _find(self, key: Any) -> _Kept | None:
        return next((kept for known, kept in reversed(self._kept) if known == key), None)

    def _agree(
        self,
        shared: Sequence[ComponentSnapshot],
        tables: Mapping[str, Any],
        digests: Sequence[dict[str, TableDigest]],
        call: str,
        cancel_key: str | None,
    ) -> AgreedPlan:
        ranks = self._ranks
        mine = digests[ranks.rank]
        leaders = leaders_of(digests)
        known: dict[str, Any] = {}
        if any(digest != mine for digest in digests) or any(p.span for c in shared for p in c.pieces):
            led = {d: tables[name] for name, (_, d) in mine.items() if leaders[name, d][0] == ranks.rank}
            for body in ranks.agree("plan", led, key=f"tables/{call}", cancel_key=cancel_key):
                known |= body
        known |= {mine[name][1]: table for name, table in tables.items()}
        merged = merge_tables(digests, leaders, known)
        first = {name: leaders[name, digest][0] for name, (_, digest) in mine.items()}
        return self._divide(shared, merged, first)

    def _divide(
        self, shared: Sequence[ComponentSnapshot], components: Mapping[str, MergedComponent], first: Mapping[str, int]
    ) -> AgreedPlan:
        specs = tuple((name, tuple(entry.spec for entry in c.entries)) for name, c in components.items())
        numbers: dict[tuple[str, str], int] = {}
        begins: dict[tuple[str, str], int] = {}
        for component in shared:
            for piece in component.pieces:
                key = component.name, piece.spec.name
                numbers[key], begins[key] = len(numbers), piece.begin
        holdings: list[RankHolding] = []
        local: list[int] = []
        redistributed: list[int] = []
        replicated: list[ReplicatedTensor] = []
        collective = False
        for name, merged in components.items():
            for entry in merged.entries:
                full = name, entry.spec.name
                local.append(numbers.get(full, -1))
                collective = collective or entry.redistributed
                if entry.redistributed and local[-1] >= 0:
                    redistributed.append(local[-1])
                holdings.append(RankHolding(entry.rows, local[-1], begins.get(full, 0)))
                if entry.spec.nbytes and any(len(holders) > 1 for holders in entry.rows.holders):
                    replicated.append(ReplicatedTensor(name, entry.spec, entry.rows, local[-1]))
        ranks, how = self._ranks, (self._format, self._codec, self._options)
        by_rank = self._options.by_rank
        if by_rank is None:
            by_rank = suits(specs, holdings, self._options)
        if by_rank:
            division = divide_by_rank(specs, holdings, ranks.rank, ranks.size, *how)
        else:
            division = divide(layouts.plan(specs, *how), holdings, ranks.rank, self._options.extent_bytes)
        whole = [
            (local[number], self._ranks.rank in division.gathered[number])
            for number in sorted(division.gathered)
            if local[number] >= 0
        ]
        owners = {name: component.owner for name, component in components.items() if component.owner is not None}
        leads = {name for name, rank in first.items() if owners.get(name, rank) == ranks.rank}
        return AgreedPlan(
            division.layout,
            {name: component.kind for name, component in components.items()},
            frozenset(leads),
            redistributed,
            whole,
            collective or bool(division.gathered),
            {name: rank for name, rank in first.items() if name not in owners and components[name].kind != "module"},
            owners,
            replicated,
            division.spread,
        )


def plan_key(shared: Sequence[ComponentSnapshot]) -> Any:
    """Return what two saves must have in common to share a plan. Cheap to compare: ``RowOwners`` and specs are the same
    objects at every save of one state."""
    return [
        (
            c.name,
            c.kind,
            [p.spec for p in c.pieces],
            [p.rows for p in c.pieces],
            [p.span for p in c.pieces],
            [p.redistribute is None for p in c.pieces],
            [p.first_only for p in c.pieces],
            c.owner,
            c.parameters,
        )
        for c in shared
    ]
