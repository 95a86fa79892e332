"""The planning of one rank of a large job is simulated here without the job's processes."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncckpt import formats
from asyncckpt.codecs import codecs
from asyncckpt.manifest.draft import Contents, contents_of
from asyncckpt.plan import layout
from asyncckpt.plan.partition import RankHolding, divide
from asyncckpt.ranks import planner as planning
from asyncckpt.types import ComponentSnapshot, Layout, LayoutOptions, LocalTensor, RowOwners, TensorSpec

_SHAPES = ((8192, 1024), (8192, 1024), (8192,), (1024,), (50257, 64))


@dataclass(frozen=True, slots=True)
class Planning:
    """Holds the seconds that planning takes once (``once_seconds``) and that finding the plan again takes at a later
    save (``again_seconds``), the bytes that the process grew by, and the rank's ``share`` of all bytes."""

    once_seconds: float
    again_seconds: float
    grown_bytes: int
    share: float


def model(tensors: int) -> list[TensorSpec]:
    """Make specs like a transformer's, fp32."""
    rng = random.Random(1)
    return [spec_of(f"t{number}", rng.choice(_SHAPES)) for number in range(tensors)]


def spec_of(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """Describe an fp32 tensor."""
    nbytes = 4
    for size in shape:
        nbytes *= size
    return TensorSpec(name, "F32", shape, nbytes)


def dealt(rows: int, parts: int, copies: int) -> RowOwners:
    """Deal rows out as torch.chunk does: uneven at the end, some ranks with nothing; each part is on ``copies``
    ranks."""
    each = -(-rows // parts) if rows else 0
    begins = [part * each for part in range(parts) if part * each < rows] or [0]
    holders = tuple(tuple(part + parts * copy for copy in range(copies)) for part in range(len(begins)))
    return RowOwners((*begins, rows), holders)


def holding(of: TensorSpec, rows: RowOwners, number: int, rank: int) -> RankHolding:
    """Return what ``rank`` holds of a tensor."""
    part = rows.part_of_rank.get(rank)
    if part is None:
        return RankHolding(rows, -1, 0)
    width = of.nbytes // rows.bounds[-1] if rows.bounds[-1] else 0
    return RankHolding(rows, number, rows.bounds[part] * width)


def plan(specs: Sequence[TensorSpec], options: LayoutOptions) -> Layout:
    components = (("m", tuple(specs)),)
    return layout.plan(components, formats.get("safetensors"), codecs.get("none"), options)


def simulate(tensors: int, ranks: int, rank: int) -> Planning:
    """Compute what ``rank`` of ``ranks`` does for a model under FSDP, at the first save and at those that follow."""
    specs = model(tensors)
    before = _resident_bytes()
    began = time.perf_counter()
    planned = plan(specs, LayoutOptions())
    rows = {count: dealt(count, ranks, 1) for count in {one.shape[0] for one in specs}}
    holdings = [holding(one, rows[one.shape[0]], number, rank) for number, one in enumerate(specs)]
    division = divide(planned, holdings, rank, LayoutOptions().extent_bytes)
    once = time.perf_counter() - began
    grown = _resident_bytes() - before
    share = sum(extent.nbytes for extent in division.layout.extents()) / planned.nbytes
    # a save's plan is looked up by this key, which is built and compared on the training thread
    pieces = [LocalTensor(one, None, 0, rows[one.shape[0]]) for one in specs]  # type: ignore[arg-type]
    component = ComponentSnapshot("m", "module", pieces, {}, None)
    kept = planning.plan_key([component])
    began = time.perf_counter()
    found = planning.plan_key([component]) == kept
    again = time.perf_counter() - began
    if not found:
        raise LookupError("the plan was not found again")
    return Planning(once, again, grown, share)


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def contents(kinds: Mapping[str, str], layout: Layout, ranks: int) -> Contents:
    """Return what a checkpoint of so many ranks would hold: components of these kinds, by name, in this layout."""
    return contents_of(
        [ComponentSnapshot(name, kind, [], {}, None) for name, kind in kinds.items()],
        layout,
        step=1,
        name="step-00000001",
        kind="full",
        metrics={},
        shard_format="safetensors",
        codec=codecs.get("none"),
        digest="xxh3-128",
        config=None,
        replace=False,
        sequence=1,
        world_size=ranks,
    )
