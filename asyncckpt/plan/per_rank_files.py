"""Lays out shards that one rank each writes, for storage on which files that ranks write together are slow.

Each rank's file holds the parts that it writes, as tensors of their own; the manifest says which box of the whole each
is. Like ``partition``, this is a pure function of the global state and of who holds what; but here the files depend on
the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asyncckpt.errors import UnsupportedValue
from asyncckpt.manifest.records import BoxRecord
from asyncckpt.plan.layout import fingerprint
from asyncckpt.plan.partition import Division, RankHolding
from asyncckpt.protocols import Codec, ShardFormat
from asyncckpt.types import Layout, LayoutOptions, Segment, ShardFile, TensorSpec

#: Components and the tensors of each, as ``layout.plan`` takes them.
Components = Sequence[tuple[str, Sequence[TensorSpec]]]


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
    """Lay out the shards of all ranks; only those of ``rank`` have extents. ``holdings[i]`` is about tensor ``i`` of
    all components, in their order.

    A part that several ranks hold is written by the one that has least to write so far. Pure.
    """
    load = [0] * ranks
    shards: list[ShardFile] = []
    first = 0
    for name, specs in components:
        parts: list[list[_Part]] = [[] for _ in range(ranks)]
        for spec, holding in zip(specs, holdings[first : first + len(specs)], strict=True):
            for part, holders in _parts(name, spec, holding):
                owner = min(holders, key=lambda one: (load[one], one))
                load[owner] += part.spec.nbytes
                parts[owner].append(part)
        first += len(specs)
        for owner, mine in enumerate(parts):
            specs = [replace(part.spec, file="") for part in mine]  # ranks cannot share a file of another name
            found = shard_format.shards(f"{name}.rank-{owner:05d}", specs, 0, len(shards), codec, options)
            shards += [_placed(shard, name, mine, mine_here=owner == rank) for shard in found]
    nbytes = sum(shard.nbytes for shard in shards)
    layout = Layout(tuple(shards), nbytes, fingerprint(tuple((name, tuple(specs)) for name, specs in components)))
    return Division(layout, {})


def _parts(component: str, spec: TensorSpec, holding: RankHolding) -> list[tuple[_Part, Sequence[int]]]:
    """List a tensor's parts, each with the ranks that hold it; a tensor without bytes is rank 0's."""
    rows = holding.rows
    if not spec.nbytes or len(rows.holders) == 1:
        return [(_Part(spec, spec, (), 0, holding), rows.holders[0] if spec.nbytes else (0,))]
    if rows.bounds[-1] != (spec.shape[0] if spec.shape else 1):
        raise UnsupportedValue(
            f"{component}.{spec.name}: ranks hold parts of it that are no whole rows, as FSDP 1 divides parameters, "
            f"and Safetensors(per_rank=True) stores boxes; leave per_rank out, or use fully_shard (FSDP2)"
        )
    width = spec.nbytes // rows.bounds[-1]
    found: list[tuple[_Part, Sequence[int]]] = []
    for number, holders in enumerate(rows.holders):
        begin, end = rows.bounds[number : number + 2]
        offsets = (begin, *(0 for _ in spec.shape[1:]))
        shape = (end - begin, *spec.shape[1:])
        entry = BoxRecord(offsets, shape, "", 0, 0).entry(f"{component}.{spec.name}")
        part = TensorSpec(entry, spec.dtype, shape, width * (end - begin), spec.frozen)
        found.append((_Part(part, spec, offsets, width * begin, holding), holders))
    return found


def _placed(shard: ShardFile, component: str, parts: Sequence[_Part], *, mine_here: bool) -> ShardFile:
    """Return a planned shard under its component's name. Its tensors name the tensor and the offsets that they are a
    box of; its extents, kept only with ``mine_here``, are numbered by this rank's own pieces."""
    by_name = {part.spec.name: part for part in parts}
    placements = tuple(
        replace(placement, part_of=part.whole, offsets=part.offsets)
        if (part := by_name[placement.spec.name]).offsets
        else placement
        for placement in shard.placements
    )

    def local(segment: Segment) -> Segment:
        part = parts[segment.piece]
        source = segment.source_offset + part.begin - part.holding.begin
        return replace(segment, piece=part.holding.local, source_offset=source)

    extents = tuple(
        replace(extent, segments=tuple(map(local, extent.segments))) for extent in (shard.extents if mine_here else ())
    )
    return replace(shard, component=component, placements=placements, extents=extents, pieces=())
