"""A rank describes what it holds of each component in a table; the tables of all ranks are merged into one state."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.errors import InvalidOption, RanksDisagree
from asyncckpt.types import ComponentSnapshot, RowOwners, TensorSpec

#: A rank describes a component by its kind and the digest of its table.
TableDigest = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the merged state. ``rows`` says whose rows are stored; ``redistributed``: some rank has its own only
    after a collective."""

    spec: TensorSpec
    rows: RowOwners
    redistributed: bool


@dataclass(frozen=True, slots=True)
class MergedComponent:
    """A component of the merged state. ``owner``: see ``ComponentSnapshot``."""

    kind: str
    entries: tuple[Entry, ...]
    owner: int | None


#: What a table says of a tensor, as a sum: its rows come from a collective; of its copies, the first is right.
_REDISTRIBUTED, _FIRST_ONLY = 1, 2


def table_of(component: ComponentSnapshot) -> Any:
    """Describe a component for the other ranks: ``{"owner": rank, "parameters": names by group, "rows": [[bounds,
    holders], …], "tensors": [[name, dtype, shape, nbytes, frozen, file, rows, span, flags], …]}``. A tensor's ``rows``
    is an index into the list, -1 where all of it is here."""
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
        flags = (piece.redistribute is not None) * _REDISTRIBUTED + piece.first_only * _FIRST_ONLY
        described = [spec.name, spec.dtype, spec.shape, spec.nbytes, spec.frozen, spec.file]
        tensors.append([*described, number, piece.span, flags])
    # an optimizer may have no tensors, and be of other parameters all the same
    parameters = [list(names) for names in component.parameters]
    return {"owner": component.owner, "parameters": parameters, "rows": rows, "tensors": tensors}


def digest_of(table: Any) -> str:
    return hashlib.sha256(json.dumps(table).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def leaders_of(digests: Sequence[Mapping[str, TableDigest]]) -> dict[tuple[str, str], list[int]]:
    """Map (component, digest) to the ranks that described it so; the first of them is its leader."""
    found: dict[tuple[str, str], list[int]] = {}
    for rank, body in enumerate(digests):
        for name, (_, digest) in body.items():
            found.setdefault((name, digest), []).append(rank)
    return found


def merge_tables(
    digests: Sequence[Mapping[str, TableDigest]],
    leaders: Mapping[tuple[str, str], Sequence[int]],
    tables: Mapping[str, Any],
) -> dict[str, MergedComponent]:
    """Merge the components of all ranks. ``tables``: by digest. Raises ``RanksDisagree`` where they contradict, and
    ``InvalidOption`` for an owner that is none of the ranks."""
    kinds: dict[str, str] = {}
    wholes: dict[str, dict[str, list[int]]] = {}  # tensors that are held whole → by which ranks
    spans: dict[str, dict[str, dict[tuple[int, int], list[int]]]] = {}
    specs: dict[str, dict[str, tuple[TensorSpec, RowOwners | None, int]]] = {}
    flagged: dict[tuple[str, str], int] = {}
    united, right = functools.cache(_united), functools.cache(_right_copies)
    owners = _owners(leaders, tables, len(digests))
    for (name, digest), ranks in leaders.items():
        kind = digests[ranks[0]][name][0]
        if kinds.setdefault(name, kind) != kind:
            raise RanksDisagree(f"component {name!r} is a {kinds[name]} on rank 0 and a {kind} on rank {ranks[0]}")
        table = tables[digest]
        rows = [RowOwners(tuple(bounds), tuple(map(tuple, holders))) for bounds, holders in table["rows"]]
        known = specs.setdefault(name, {})
        for tensor, dtype, shape, nbytes, frozen, file, number, span, flags in table["tensors"]:
            if flags:
                flagged[name, tensor] = flagged.get((name, tensor), 0) | flags
            spec = TensorSpec(tensor, dtype, tuple(shape), nbytes, frozen, file)
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
    known_rows: dict[Any, RowOwners] = {}

    @functools.cache
    def same(rows: RowOwners) -> RowOwners:
        """Return one object for all that say the same: what is planned and listed by rows is so once for each."""
        return known_rows.setdefault((rows.bounds, rows.holders), rows)

    found: dict[str, MergedComponent] = {}
    for name, tensors in specs.items():
        entries: list[Entry] = []
        for tensor, (spec, held, _) in tensors.items():
            count = spec.shape[0] if spec.shape else 1
            if held is None and tensor in spans.get(name, {}):
                held = _from_spans(f"{name}.{tensor}", count, spans[name][tensor])
            elif held is None:
                ranks = tuple(sorted(wholes[name][tensor]))
                held = interned.setdefault((count, ranks), RowOwners((0, count), (ranks,)))
            flags, owner = flagged.get((name, tensor), 0), owners[name]
            if flags & _FIRST_ONLY or owner is not None:
                held = right(held, owner)
            entries.append(Entry(spec, same(held), bool(flags & _REDISTRIBUTED)))
        found[name] = MergedComponent(kinds[name], tuple(entries), owners[name])
    return found


def _owners(
    leaders: Mapping[tuple[str, str], Sequence[int]], tables: Mapping[str, Any], size: int
) -> dict[str, int | None]:
    """Return the owner of each component. Raises as ``merge_tables`` does."""
    owners: dict[str, int | None] = {}
    holders: dict[str, list[int]] = {}
    for (name, digest), ranks in leaders.items():
        owner = tables[digest]["owner"]
        if owners.setdefault(name, owner) != owner:
            raise RanksDisagree(
                f"component {name!r}: rank {holders[name][0]} says that {_owned_by(owners[name])}, rank {ranks[0]} "
                f"that {_owned_by(owner)}. Give every rank the same Owner(…, rank=…)"
            )
        holders.setdefault(name, []).extend(ranks)
    for name, owner in owners.items():
        if owner is not None and owner >= size:
            raise InvalidOption(f"component {name!r}: Owner(…, rank={owner}), but the job has {size} ranks")
        if owner is not None and owner not in holders[name]:
            raise RanksDisagree(f"component {name!r} is rank {owner}'s (Owner), which does not have it in its state")
    return owners


def _owned_by(owner: int | None) -> str:
    return "all ranks have equal copies" if owner is None else f"rank {owner} has the right copy"


def _right_copies(rows: RowOwners, owner: int | None) -> RowOwners:
    """Leave of each part's holders the owner, or the first where that has no copy of the part."""
    chosen = ((owner if owner is not None and owner in holders else min(holders),) for holders in rows.holders)
    return RowOwners(rows.bounds, tuple(chosen))


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
