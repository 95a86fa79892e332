"""Lays out shards that one rank each writes, for storage on which files that ranks write together are slow.

Each rank's file holds the parts that it writes, as tensors of their own; the manifest says which box of the whole each
is. Like ``partition``, this is a pure function of the global state and of who holds what; but here the files depend on
the number of ranks. A rank lays out its own files and no others, so planning takes as long as it holds tensors.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from asyncckpt.errors import UnsupportedValue
from asyncckpt.formats import read_boundaries
from asyncckpt.manifest.records import BoxRecord
from asyncckpt.plan.layout import fingerprint
from asyncckpt.plan.partition import Division, RankHolding, SpreadTensor, SpreadTensors
from asyncckpt.protocols import Codec, ShardFormat
from asyncckpt.types import Extent, Layout, LayoutOptions, RowOwners, Segment, ShardFile, TensorRange, TensorSpec

#: Components and the tensors of each, as ``layout.plan`` takes them.
Components = Sequence[tuple[str, Sequence[TensorSpec]]]

#: What several ranks hold alike is divided among them by rows, but into no smaller pieces.
_LEAST_BYTES = 1 << 20
#: What all holders of the same rows have is divided among so many of them that each writes this much: whoever restores
#: small tensors that thousands of ranks hold, such as the step counts of an optimizer, need not ask thousands.
_RUN_BYTES = 4 << 20
#: A job that opens fewer files at a save, over all ranks, has files that do not depend on the number of ranks.
_MANY_FILES = 4096


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of a tensor's rows that one rank writes. ``holding``: what the planning rank holds of the tensor;
    ``begin``: the part's first byte in the whole tensor."""

    spec: TensorSpec
    whole: TensorSpec
    offsets: tuple[int, ...]
    begin: int
    holding: RankHolding


def divide_by_rank(
    components: Components,
    holdings: Sequence[RankHolding],
    rank: int,
    ranks: int,
    shard_format: ShardFormat,
    codec: Codec,
    options: LayoutOptions,
) -> Division:
    """Lay out the shards of ``rank``. ``holdings[i]`` is about tensor ``i`` of all components, in their order. Pure.

    Where several ranks hold the same rows, each writes as many bytes as the others: the tensors that the same ranks
    hold are one line of bytes, of which every holder takes an equal run, cut between two rows.
    """
    runs = _Runs(components, holdings)
    shards: list[ShardFile] = []
    first = 0
    for name, specs in components:
        parts: list[_Part] = []
        for number, spec in enumerate(specs, first):
            parts += _parts(name, spec, holdings[number], rank, runs.place(number))
        first += len(specs)
        placed = [replace(part.spec, file="") for part in parts]  # ranks cannot share a file of another name
        found = shard_format.shards(f"{name}.rank-{rank:05d}", placed, 0, len(shards), codec, options)
        shards += [_placed(shard, name, parts) for shard in found]
    nbytes = sum(spec.nbytes for _, specs in components for spec in specs)
    layout = Layout(
        tuple(shards), nbytes, fingerprint(tuple((name, tuple(specs)) for name, specs in components)), of_rank=True
    )
    return Division(layout, {}, runs.spread_tensors(ranks, nbytes // options.extent_bytes))


def suits(components: Components, holdings: Sequence[RankHolding], options: LayoutOptions) -> bool:
    """Return whether files of one rank each are better than files that all ranks write: where half of all bytes would
    be written in pieces under an extent, and the job opens thousands of files. Never where a tensor has to lie in a
    file of another name, or ranks hold parts of rows. Pure; the same on every rank."""
    sizes: list[tuple[float, int]] = []
    opened = tensor = 0
    for _, specs in components:
        writers = 0
        for spec in specs:
            rows = holdings[tensor].rows
            tensor += 1
            if not spec.nbytes:
                continue
            if spec.file or (len(rows.holders) > 1 and rows.bounds[-1] != (spec.shape[0] if spec.shape else 1)):
                return False
            holders = len(rows.part_of_rank)
            writers = max(writers, holders)
            sizes.append((spec.nbytes / holders, spec.nbytes))
        opened += writers * -(-sum(spec.nbytes for spec in specs) // options.shard_bytes)
    if opened < _MANY_FILES:
        return False
    small = sum(nbytes for piece, nbytes in sizes if piece < options.extent_bytes)
    return 2 * small > sum(nbytes for _, nbytes in sizes)


class _Runs:
    """Divides what several ranks hold alike among them: a tensor's place in the line of bytes of all that the same
    ranks hold decides which of them write it."""

    def __init__(self, components: Components, holdings: Sequence[RankHolding]) -> None:
        self._components = components
        self._holdings = holdings
        self._numbers: dict[RowOwners, int] = {}
        self._begins: list[int] = []
        self._specs = [spec for _, specs in components for spec in specs]
        lines: dict[tuple[tuple[int, ...], ...], int] = {}
        self._lines: list[int] = []  # of each spread: the number of its line
        totals: list[int] = []
        for spec, holding in zip(self._specs, holdings, strict=True):
            number = self._numbers.setdefault(holding.rows, len(self._lines))
            if number == len(self._lines):
                self._lines.append(lines.setdefault(holding.rows.holders, len(totals)))
                totals += [0] * (len(lines) - len(totals))
            line = self._lines[number]
            self._begins.append(totals[line])
            totals[line] += spec.nbytes
        self._totals = [totals[line] for line in self._lines]

    def place(self, tensor: int) -> tuple[int, int, int]:
        """Return where a tensor lies in its line of bytes, and the line's length: ``(begin, end, total)``."""
        begin = self._begins[tensor]
        return begin, begin + self._specs[tensor].nbytes, self._totals[self._numbers[self._holdings[tensor].rows]]

    def spread_tensors(self, ranks: int, extents: int) -> SpreadTensors:
        """Return who writes what. ``extents``: about how many there are, before they are cut."""
        found: dict[str, dict[str, SpreadTensor]] = {}
        counts = [self._writing_alike(rows, number) for rows, number in self._numbers.items()]
        described = tensor = 0
        for name, specs in self._components:
            here = found[name] = {}
            for spec in specs:
                rows = self._holdings[tensor].rows
                number = self._numbers[rows]
                count = counts[number]
                copies = _writers(*self.place(tensor), count) if spec.nbytes and count is not None else None
                here[spec.name] = SpreadTensor(spec, number, copies)
                parts = len(rows.holders)
                described += parts * (1 + read_boundaries.part_rows(spec.nbytes // parts))
                tensor += 1
        return SpreadTensors(tuple(self._numbers), found, described + extents + ranks)

    def _writing_alike(self, rows: RowOwners, number: int) -> int | None:
        """Return how many holders of each part write; None where parts have a single holder, or differ in this."""
        counts = {_writing(len(ranks), self._totals[number] // len(rows.holders)) for ranks in rows.holders}
        single = max(map(len, rows.holders)) == 1
        return None if single or len(counts) > 1 else counts.pop()


def _writing(holders: int, nbytes: int) -> int:
    """Return how many of the holders of the same rows, which have so many bytes, write any of them: the first ones."""
    return min(holders, max(1, nbytes // _RUN_BYTES))


def _writers(begin: int, end: int, total: int, count: int) -> tuple[int, int]:
    """Return the first and the last of ``count`` holders whose runs of a line of ``total`` bytes share any with
    ``[begin, end)``."""
    return begin * count // total, (end - 1) * count // total


def _parts(
    component: str, spec: TensorSpec, holding: RankHolding, rank: int, place: tuple[int, int, int]
) -> list[_Part]:
    """List the parts of a tensor that this rank writes: at most one. A tensor without bytes is rank 0's."""
    rows = holding.rows
    if not spec.nbytes:
        return [_Part(spec, spec, (), 0, holding)] if rank == 0 else []
    if len(rows.holders) > 1 and rows.bounds[-1] != (spec.shape[0] if spec.shape else 1):
        raise UnsupportedValue(
            f"{component}.{spec.name}: ranks hold parts of it that are no whole rows, as FSDP 1 divides parameters, "
            f"and Safetensors(per_rank=True) stores boxes; leave per_rank out, or use fully_shard (FSDP2)"
        )
    number = rows.part_of_rank.get(rank)
    if number is None:
        return []
    count = spec.shape[0] if spec.shape else 1
    low, high = rows.bounds[number : number + 2] if len(rows.holders) > 1 else (0, count)
    width = spec.nbytes // count
    holders = rows.holders[number]
    writing = _writing(len(holders), place[2] // len(rows.holders))
    begin, end = _share(holders.index(rank), writing, (high - low) * width, width, place)
    begin, end = low + begin, low + end
    if begin >= end:
        return []
    if (begin, end) == (0, count):
        return [_Part(spec, spec, (), 0, holding)]
    offsets, shape = (begin, *(0 for _ in spec.shape[1:])), (end - begin, *spec.shape[1:])
    entry = BoxRecord(offsets, shape, "", 0, 0).entry(f"{component}.{spec.name}")
    part = TensorSpec(entry, spec.dtype, shape, width * (end - begin), spec.frozen)
    return [_Part(part, spec, offsets, width * begin, holding)]


def _share(member: int, count: int, nbytes: int, width: int, place: tuple[int, int, int]) -> tuple[int, int]:
    """Return the rows of a part of ``nbytes`` that holder ``member`` of ``count`` writes, counted from the part's
    first. ``width``: the bytes of a row."""
    rows = nbytes // width
    if count == 1:
        return 0, rows if member == 0 else 0
    begin, end, total = place
    first, last = _writers(begin, end, total, count)
    if first == last or nbytes < 2 * _LEAST_BYTES:
        return (0, rows) if member == first else (0, 0)
    if not first <= member <= last:
        return 0, 0
    edges = []
    for edge in (member, member + 1):
        at = min(max(edge * total - begin * count, 0), (end - begin) * count)
        row = at * rows // ((end - begin) * count)
        row = 0 if row * width < _LEAST_BYTES else rows if (rows - row) * width < _LEAST_BYTES else row
        edges.append(row)
    return (0 if member == first else edges[0]), (rows if member == last else edges[1])


def _placed(shard: ShardFile, component: str, parts: Sequence[_Part]) -> ShardFile:
    """Return a planned shard under its component's name. Its tensors name the tensor and the offsets that they are a
    box of; its extents are numbered by this rank's own pieces."""
    by_name = {part.spec.name: part for part in parts}
    placements = tuple(
        replace(placement, part_of=part.whole, offsets=part.offsets)
        if (part := by_name[placement.spec.name]).offsets
        else placement
        for placement in shard.placements
    )
    cuts = sorted({cut for placement in shard.placements for cut in _cuts(placement, by_name[placement.spec.name])})

    def local(segment: Segment) -> Segment:
        part = parts[segment.piece]
        source = segment.source_offset + part.begin - part.holding.begin
        return replace(segment, piece=part.holding.local, source_offset=source)

    def cut(extent: Extent) -> Extent:
        low = bisect.bisect_right(cuts, extent.offset)
        high = bisect.bisect_left(cuts, extent.offset + extent.nbytes)
        at = tuple(offset - extent.offset for offset in cuts[low:high])
        return replace(extent, segments=tuple(map(local, extent.segments)), digest_boundaries=at)

    extents = tuple(map(cut, shard.extents))
    return replace(shard, component=component, placements=placements, extents=extents, pieces=())


def _cuts(placement: TensorRange, part: _Part) -> Iterator[int]:
    """Yield the offsets in its file at which a part of a tensor is cut (``formats/read_boundaries.py``)."""
    whole, spec = part.whole, part.spec
    if spec.nbytes and spec.shape:
        rows, count = whole.shape[0], spec.shape[0]
        first = part.offsets[0] if part.offsets else 0
        for at in read_boundaries.part_boundaries(rows, first, count, spec.nbytes // count):
            yield placement.begin + at
