"""Divides a layout among the ranks that stage and write it: a pure function of the layout and of who holds what.

A plain shard is one line of bytes. Where one rank holds a stretch of it, that rank writes it; a stretch that several
ranks hold is divided evenly among them; a short one goes to the rank that writes the bytes before it. A shard that
cannot be written in parts (encoded, zarr) is written whole by one rank, chosen so that all write about as many bytes;
so is a shard that training does not change, which can then be taken over from the checkpoint before.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from asyncckpt.errors import UnsupportedValue
from asyncckpt.formats.plain_extents import PlacedTensor, extents_of
from asyncckpt.types import ALIGNMENT_BYTES, Extent, Layout, RowOwners, ShardFile, TensorRange, TensorSpec

#: Shorter stretches that several ranks hold are not divided.
_MIN_DIVIDED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RankHolding:
    """Says what this rank holds of one piece of the layout: ``local`` is the index among the rank's own pieces (-1: it
    holds nothing), ``begin`` the byte of the tensor where its part begins. ``rows`` says it for all ranks."""

    rows: RowOwners
    local: int
    begin: int


@dataclass(frozen=True, slots=True)
class SpreadTensor:
    """Says which ranks write a tensor: of the holders of each part of ``spreads[spread]``, those from the first to the
    last of ``copies``; all of them where that is None."""

    spec: TensorSpec
    spread: int
    copies: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class SpreadTensors:
    """Says of every tensor of a layout by rank which ranks write it, alike on all ranks. ``tensors``: by component and
    name. ``rows``: about how many rows the manifest of all ranks has, a row for each box and for each extent."""

    spreads: tuple[RowOwners, ...]
    tensors: Mapping[str, Mapping[str, SpreadTensor]]
    rows: int


@dataclass(frozen=True, slots=True)
class Division:
    """A rank's part of a layout. ``layout`` has all shards, each with the extents of this rank alone, or, where each
    rank has files of its own, those of this rank. ``gathered``: the pieces that have to be gathered, by their index in
    the layout → the ranks that need all rows. ``spread``: who writes what, where each rank has files of its own."""

    layout: Layout
    gathered: Mapping[int, frozenset[int]]
    spread: SpreadTensors | None = None


def divide(layout: Layout, holdings: Sequence[RankHolding], rank: int, extent_bytes: int) -> Division:
    """Divide a layout, and return the part of ``rank``. ``holdings[i]`` is about piece ``i`` of the layout. Pure; takes
    about a second for 10,000 tensors."""
    load: dict[int, int] = {}
    whole: dict[int, set[int]] = {}
    shards: list[ShardFile] = []
    for number, shard in enumerate(layout.shards):
        pieces = _pieces_of(shard)
        owner = _owner(shard, [holdings[piece].rows for piece in pieces], load)
        if owner is not None:
            load[owner] = load.get(owner, 0) + shard.nbytes
            for piece in pieces:
                if len(holdings[piece].rows.holders) > 1:
                    whole.setdefault(piece, set()).add(owner)
            extents = shard.extents if owner == rank else ()
            shards.append(replace(shard, extents=tuple(_local(extent, holdings) for extent in extents)))
        else:
            shards.append(_part(number, shard, holdings, rank, extent_bytes))
    return Division(
        replace(layout, shards=tuple(shards)), {piece: frozenset(owners) for piece, owners in whole.items()}
    )


def _pieces_of(shard: ShardFile) -> set[int]:
    """Return the pieces that bytes of a shard come from."""
    if shard.placements:
        return {n for n, place in zip(shard.pieces, shard.placements, strict=True) if place.spec.nbytes}
    return {segment.piece for extent in shard.extents for segment in extent.segments}


def _owner(shard: ShardFile, rows: Sequence[RowOwners], load: Mapping[int, int]) -> int | None:
    """Choose the rank that writes all of a shard; None where it is divided. Raises ``UnsupportedValue`` where no rank
    can."""
    frozen = bool(shard.placements) and all(placement.spec.frozen for placement in shard.placements)
    spread = any(len(held.holders) > 1 for held in rows)
    if not rows:
        return 0
    if (shard.placements or not shard.runs) and (spread or not frozen):
        return None
    candidates = set.intersection(*(set(held.part_of_rank) for held in rows))
    if not candidates:
        raise UnsupportedValue(
            f"{shard.file}: no rank holds a part of all tensors in it (pipeline stages?), so none can encode it. Use "
            f"format='zarr', which has files of their own for tensors, or codec='none'"
        )
    return min(candidates, key=lambda rank: (load.get(rank, 0), rank))


def _local(extent: Extent, holdings: Sequence[RankHolding]) -> Extent:
    """Return the extent with its segments numbered by this rank's own pieces."""
    segments = tuple(replace(segment, piece=holdings[segment.piece].local) for segment in extent.segments)
    return replace(extent, segments=segments)


# -- a line of bytes -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _HeldTensor:
    """A tensor in the line of bytes, and who holds it."""

    placement: TensorRange
    holding: RankHolding


def _part(number: int, shard: ShardFile, holdings: Sequence[RankHolding], rank: int, extent_bytes: int) -> ShardFile:
    placed = zip(shard.placements, shard.pieces, strict=True)
    lying = [_HeldTensor(place, holdings[piece]) for place, piece in placed if place.spec.nbytes]
    spans = _joined(_spans(lying, shard.nbytes, rank))
    mine = [PlacedTensor(item.placement, item.holding.local, item.holding.begin) for item in lying]
    extents = tuple(extents_of(number, spans, shard.header, mine, extent_bytes))
    return replace(shard, extents=extents, multi_writer=sum(extent.nbytes for extent in extents) != shard.nbytes)


def _spans(lying: Sequence[_HeldTensor], nbytes: int, rank: int) -> Iterator[tuple[int, int]]:
    """Yield this rank's byte ranges of the file, in order."""
    begin = 0  # of the stretch that ``holders`` hold; the header belongs to the first
    holders: tuple[int, ...] | None = None
    last = 0
    for item in lying:
        rows, place = item.holding.rows, item.placement
        if holders is None:
            holders = rows.holders[0]
        if len(rows.holders) == 1:
            if rows.holders[0] is not holders and rows.holders[0] != holders:
                last = yield from _shares(begin, place.begin, holders, last, rank)
                begin, holders = place.begin, rows.holders[0]
            continue
        last = yield from _shares(begin, place.begin, holders, last, rank)
        width = place.spec.nbytes // rows.bounds[-1]
        part = rows.part_of_rank.get(rank)
        end = len(rows.holders) - 1
        for chosen in sorted({end if part is None else part, end}):
            low, high = place.begin + rows.bounds[chosen] * width, place.begin + rows.bounds[chosen + 1] * width
            last = yield from _shares(low, high, rows.holders[chosen], None, rank)
        begin, holders = place.end, (last,)
    yield from _shares(begin, nbytes, holders or (0,), last, rank)


def _shares(
    begin: int, end: int, holders: tuple[int, ...], before: int | None, rank: int
) -> Generator[tuple[int, int], None, int]:
    """Yield this rank's share of a stretch that all of ``holders`` hold; return the rank that writes its end.
    ``before`` is the rank that writes the bytes before it."""
    count = len(holders)
    if count == 1 or end - begin < _MIN_DIVIDED_BYTES:
        owner = before if before in holders and before is not None else holders[zlib.crc32(b"%d" % begin) % count]
        if owner == rank and begin < end:
            yield begin, end
        return owner
    if rank in holders:
        at = holders.index(rank)
        low, high = (_edge(begin, end, index, count) for index in (at, at + 1))
        if low < high:
            yield low, high
    return holders[-1]


def _edge(begin: int, end: int, index: int, count: int) -> int:
    """Return where share ``index`` of ``count`` begins: at a block's begin, so that two ranks never write one block."""
    if index in (0, count):
        return end if index else begin
    return (begin + (end - begin) * index // count) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for begin, end in spans:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found
