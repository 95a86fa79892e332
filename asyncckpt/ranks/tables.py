"""A rank describes what it holds of each component in a table; the tables of all ranks are merged into one state."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.errors import RanksDisagree
from asyncckpt.types import ComponentSnapshot, RowOwners, TensorSpec

#: A rank describes a component by its kind and the digest of its table.
TableDigest = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    spec: TensorSpec
    rows: RowOwners
    redistributed: bool


@dataclass(frozen=True, slots=True)
class MergedComponent:
    kind: str
    entries: tuple[Entry, ...]


def table_of(component: ComponentSnapshot) -> Any:
    """Describe a component for the other ranks: ``{"rows": [[bounds, holders], …], "tensors": [[name, dtype, shape,
    nbytes, frozen, rows, span, redistributed], …]}``. A tensor's ``rows`` is an index into the list, -1 where all of it
    is here; ``redistributed``: a rank has its rows only after a collective."""
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
        tensors.append(
            [
                spec.name,
                spec.dtype,
                spec.shape,
                spec.nbytes,
                spec.frozen,
                number,
                piece.span,
                piece.redistribute is not None,
            ]
        )
    return {"rows": rows, "tensors": tensors}


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
    """Merge the components of all ranks. ``tables``: by digest. Raises ``RanksDisagree`` where they contradict."""
    kinds: dict[str, str] = {}
    wholes: dict[str, dict[str, list[int]]] = {}  # tensors that are held whole → by which ranks
    spans: dict[str, dict[str, dict[tuple[int, int], list[int]]]] = {}
    specs: dict[str, dict[str, tuple[TensorSpec, RowOwners | None, int]]] = {}
    moved: set[tuple[str, str]] = set()
    united = functools.cache(_united)
    for (name, digest), ranks in leaders.items():
        kind = digests[ranks[0]][name][0]
        if kinds.setdefault(name, kind) != kind:
            raise RanksDisagree(f"component {name!r} is a {kinds[name]} on rank 0 and a {kind} on rank {ranks[0]}")
        table = tables[digest]
        rows = [RowOwners(tuple(bounds), tuple(map(tuple, holders))) for bounds, holders in table["rows"]]
        known = specs.setdefault(name, {})
        for tensor, dtype, shape, nbytes, frozen, number, span, redistributed in table["tensors"]:
            if redistributed:
                moved.add((name, tensor))
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
            entries.append(Entry(spec, held, (name, tensor) in moved))
        found[name] = MergedComponent(kinds[name], tuple(entries))
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
