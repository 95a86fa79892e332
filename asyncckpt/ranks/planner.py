"""All ranks of a job agree on one layout, and keep it for as long as every rank's names and shapes stay the same.

Each rank describes what it holds. Where all descriptions are equal (DDP, FSDP), only their digests are sent; where
they are not (pipeline stages, experts), each distinct one is sent once, and every rank merges them in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from asyncckpt.errors import RanksDisagree, UnsupportedValue
from asyncckpt.plan import layout as layouts
from asyncckpt.plan.partition import RankHolding, divide
from asyncckpt.plan.per_rank_files import divide_by_rank
from asyncckpt.plan.planned import Planned
from asyncckpt.protocols import Codec, ShardFormat
from asyncckpt.ranks.store import RankStore
from asyncckpt.state.rank_names import rank_name
from asyncckpt.types import ComponentSnapshot, Layout, LayoutOptions, LocalTensor, RowOwners, Snapshot, TensorSpec

#: A rank describes a component by its kind and the digest of its table.
_Digest = tuple[str, str]


@dataclass(frozen=True, slots=True)
class AgreedPlan:
    """Holds what all ranks have agreed on, as this rank sees it. ``kinds``: the shared components' kinds, by name.
    ``sends_values_of``: the components whose plain values this rank sends: it is the first of the ranks that hold the
    same parts of them. ``gathered``: the indexes, among this rank's shared pieces, of those to gather, in the same
    order on all ranks, each with whether this rank keeps the tensor."""

    layout: Layout
    kinds: Mapping[str, str]
    sends_values_of: frozenset[str]
    gathered: Sequence[tuple[int, bool]]


class JobPlanner:
    """Plans the saves of one rank. Not thread-safe: for the training thread."""

    def __init__(self, ranks: RankStore, shard_format: ShardFormat, codec: Codec, options: LayoutOptions) -> None:
        self._ranks = ranks
        self._format = shard_format
        self._codec = codec
        self._options = options
        #: Pairs of ``plan_key`` and what was agreed. Comparing keys is cheap: their parts are the same objects every
        #: time.
        self._kept: deque[tuple[Any, AgreedPlan]] = deque(maxlen=8)

    def plan(self, snapshot: Snapshot, key: str, cancel_key: str | None = None, *, gather: bool = True) -> Planned:
        """Plan a save. Where this rank's names or shapes are new, blocks until all ranks have called with the same
        ``key``; ``cancel_key``: see ``RankStore.agree``. Where a shard has to be written whole, and with ``gather``,
        gathers its tensors: a collective of the training's own communication. Raises ``RanksDisagree``, ``RankLost``,
        ``PlanChanged``, ``UnsupportedValue``."""
        shared = [component for component in snapshot.components if component.shared]
        agreed = self._agreed(shared, key, cancel_key)
        pieces = [piece for component in shared for piece in component.pieces]
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
        nbytes = sum(shard.nbytes for shard in shards)
        layout = replace(agreed.layout, shards=tuple(shards), nbytes=nbytes)
        return Planned(snapshot.step, pieces, layout, components, own, agreed.sends_values_of)

    def is_cached(self, snapshot: Snapshot) -> bool:
        """Whether ``plan`` can do without asking the other ranks."""
        return self._find(plan_key([component for component in snapshot.components if component.shared])) is not None

    def invalidate(self) -> None:
        """Forget all plans: the next save asks the other ranks, whatever it holds."""
        self._kept.clear()

    def _agreed(self, shared: Sequence[ComponentSnapshot], call: str, cancel_key: str | None) -> AgreedPlan:
        key = plan_key(shared)
        found = self._find(key)
        if found is None:
            found = self._agree(shared, call, cancel_key)
            self._kept.append((key, found))
        return found

    def _find(self, key: Any) -> AgreedPlan | None:
        return next((agreed for known, agreed in self._kept if known == key), None)

    def _agree(self, shared: Sequence[ComponentSnapshot], call: str, cancel_key: str | None) -> AgreedPlan:
        ranks = self._ranks
        tables = {component.name: _table(component) for component in shared}
        mine = {component.name: (component.kind, _digest(tables[component.name])) for component in shared}
        digests: list[dict[str, _Digest]] = [
            {name: (kind, digest) for name, (kind, digest) in body.items()}
            for body in ranks.agree("plan", mine, key=f"plan/{call}", cancel_key=cancel_key)
        ]
        leaders = _leaders(digests)
        known: dict[str, Any] = {}
        if any(digest != mine for digest in digests) or any(p.span for c in shared for p in c.pieces):
            led = {d: tables[name] for name, (_, d) in mine.items() if leaders[name, d][0] == ranks.rank}
            for body in ranks.agree("plan", led, key=f"tables/{call}", cancel_key=cancel_key):
                known |= body
        known |= {mine[name][1]: table for name, table in tables.items()}
        leads = {name for name, (_, digest) in mine.items() if leaders[name, digest][0] == ranks.rank}
        return self._divide(shared, _merge(digests, leaders, known), leads)

    def _divide(
        self, shared: Sequence[ComponentSnapshot], components: Mapping[str, _Component], leads: set[str]
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
        for name, merged in components.items():
            for entry in merged.entries:
                full = name, entry.spec.name
                local.append(numbers.get(full, -1))
                holdings.append(RankHolding(entry.rows, local[-1], begins.get(full, 0)))
        ranks, how = self._ranks, (self._format, self._codec, self._options)
        if self._options.by_rank:
            division = divide_by_rank(specs, holdings, ranks.rank, ranks.size, *how)
        else:
            division = divide(layouts.plan(specs, *how), holdings, ranks.rank, self._options.extent_bytes)
        whole = [
            (local[number], self._ranks.rank in division.gathered[number])
            for number in sorted(division.gathered)
            if local[number] >= 0
        ]
        return AgreedPlan(division.layout, {n: c.kind for n, c in components.items()}, frozenset(leads), whole)


# -- tables ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Entry:
    spec: TensorSpec
    rows: RowOwners


@dataclass(frozen=True, slots=True)
class _Component:
    kind: str
    entries: tuple[_Entry, ...]


def plan_key(shared: Sequence[ComponentSnapshot]) -> Any:
    """Return what two saves must have in common to share a plan. Cheap to compare: ``RowOwners`` and specs are the same
    objects at every save of one state."""
    return [
        (c.name, c.kind, [p.spec for p in c.pieces], [p.rows for p in c.pieces], [p.span for p in c.pieces])
        for c in shared
    ]


def _table(component: ComponentSnapshot) -> Any:
    """Describe a component for the other ranks: ``{"rows": [[bounds, holders], …], "tensors": [[name, dtype, shape,
    nbytes, frozen, rows, span], …]}``. A tensor's ``rows`` is an index into the list, -1 where all of it is here."""
    numbers: dict[int, int] = {}
    rows: list[Any] = []
    tensors: list[Any] = []
    for piece in component.pieces:
        number = -1
        if piece.rows is not None:
            number = numbers.setdefault(id(piece.rows), len(rows))
            if number == len(rows):
                rows.append([piece.rows.bounds, piece.rows.holders])
        spec = piece.spec
        tensors.append([spec.name, spec.dtype, spec.shape, spec.nbytes, spec.frozen, number, piece.span])
    return {"rows": rows, "tensors": tensors}


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _leaders(digests: Sequence[Mapping[str, _Digest]]) -> dict[tuple[str, str], list[int]]:
    """Map (component, digest) to the ranks that described it so; the first of them is its leader."""
    found: dict[tuple[str, str], list[int]] = {}
    for rank, body in enumerate(digests):
        for name, (_, digest) in body.items():
            found.setdefault((name, digest), []).append(rank)
    return found


def _merge(
    digests: Sequence[Mapping[str, _Digest]],
    leaders: Mapping[tuple[str, str], Sequence[int]],
    tables: Mapping[str, Any],
) -> dict[str, _Component]:
    """Merge the components of all ranks. ``tables``: by digest. Raises ``RanksDisagree`` where they contradict."""
    kinds: dict[str, str] = {}
    wholes: dict[str, dict[str, list[int]]] = {}  # tensors that are held whole → by which ranks
    spans: dict[str, dict[str, dict[tuple[int, int], list[int]]]] = {}
    specs: dict[str, dict[str, tuple[TensorSpec, RowOwners | None, int]]] = {}
    united = functools.cache(_united)
    for (name, digest), ranks in leaders.items():
        kind = digests[ranks[0]][name][0]
        if kinds.setdefault(name, kind) != kind:
            raise RanksDisagree(f"component {name!r} is a {kinds[name]} on rank 0 and a {kind} on rank {ranks[0]}")
        table = tables[digest]
        rows = [RowOwners(tuple(bounds), tuple(map(tuple, holders))) for bounds, holders in table["rows"]]
        known = specs.setdefault(name, {})
        for tensor, dtype, shape, nbytes, frozen, number, span in table["tensors"]:
            spec = TensorSpec(tensor, dtype, tuple(shape), nbytes, frozen)
            here = rows[number] if number >= 0 else None
            before = known.setdefault(tensor, (spec, here, ranks[0]))
            if before[0] != spec or (before[1] is None) != (number < 0):
                raise RanksDisagree(
                    f"tensor {name}.{tensor} is {dtype} {shape} on rank {ranks[0]} and {before[0].dtype} "
                    f"{list(before[0].shape)} on rank {before[2]}, or split on one of them alone. Ranks must hold "
                    f"parts or copies of one tensor, or give it different names"
                )
            if here is not None and before[1] is not None and before[1] is not here:
                known[tensor] = spec, united(before[1], here), before[2]
            if span is not None:
                spans.setdefault(name, {}).setdefault(tensor, {}).setdefault(tuple(span), []).extend(ranks)
            elif number < 0:
                wholes.setdefault(name, {}).setdefault(tensor, []).extend(ranks)
    interned: dict[Any, RowOwners] = {}
    found: dict[str, _Component] = {}
    for name, tensors in specs.items():
        entries: list[_Entry] = []
        for tensor, (spec, held, _) in tensors.items():
            count = spec.shape[0] if spec.shape else 1
            if held is None and tensor in spans.get(name, {}):
                held = _from_spans(f"{name}.{tensor}", count, spans[name][tensor])
            elif held is None:
                ranks = tuple(sorted(wholes[name][tensor]))
                held = interned.setdefault((count, ranks), RowOwners((0, count), (ranks,)))
            entries.append(_Entry(spec, held))
        found[name] = _Component(kinds[name], tuple(entries))
    return found


def _united(first: RowOwners, second: RowOwners) -> RowOwners:
    """Unite what two groups of ranks hold, each of which holds the whole tensor (fully_shard on one dimension of a
    mesh, say). Where they have cut it differently, the first group's parts are written."""
    if first.bounds != second.bounds or first.holders == second.holders:
        return first
    pairs = zip(first.holders, second.holders, strict=True)
    return RowOwners(first.bounds, tuple(tuple(sorted({*one, *other})) for one, other in pairs))


def _from_spans(where: str, count: int, spans: Mapping[tuple[int, int], Sequence[int]]) -> RowOwners:
    chosen = sorted(span for span in spans if span[0] < span[1])
    bounds = (*(begin for begin, _ in chosen), count)
    if any(end != bounds[i + 1] for i, (_, end) in enumerate(chosen)) or bounds[0] != 0:
        raise RanksDisagree(f"the LocalShards of {where} do not cover its {count} rows exactly: {chosen}")
    return RowOwners(bounds, tuple(tuple(sorted(spans[span])) for span in chosen))
