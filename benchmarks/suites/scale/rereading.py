"""How much a rank reads of a checkpoint that another number of ranks has written, each into files of its own: the
product's own layout and digests, with made-up ranks."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from asyncckpt import formats
from asyncckpt.codecs import codecs
from asyncckpt.plan.per_rank_files import divide_by_rank
from asyncckpt.types import LayoutOptions, TensorRange
from benchmarks.suites.scale.models import Job, components, holdings, llama

JOBS = (
    (Job("70B", lambda: llama(80, 8192, 28_672, 128_256), 512), (500, 384, 256, 1024)),
    (Job("405B", lambda: llama(126, 16_384, 53_248, 128_256), 4096), (4000, 3072, 2048, 8192)),
)
#: Takes a second.
QUICK = ((Job("a small one", lambda: llama(2, 4096, 14_336, 1000), 16), (12,)),)
#: Component and tensor → its place in a rank's file, and where the digests of that file end.
_Written = dict[tuple[str, str], tuple[str, TensorRange, list[int]]]


def ratios(jobs: Sequence[tuple[Job, Sequence[int]]]) -> list[dict[str, Any]]:
    """Return, for each job and each other number of ranks, the bytes that a rank reads over those that it needs: the
    worst of the first rank, one in the middle, and one somewhere."""
    found: list[dict[str, Any]] = []
    for job, others in jobs:
        written = _Files(job)
        for ranks in others:
            worst = max(written.ratio(rank, ranks) for rank in (0, ranks // 2, 77))
            found.append({"job": job.name, "ranks": job.ranks, "other": ranks, "ratio": worst})
    return found


class _Files:
    """Lays out the files of those ranks of a job that are asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._known = components(job.shapes())
        self._specs = [spec for _, found in self._known for spec in found]
        self._held = holdings(job, self._specs, 0)
        self._written: dict[int, _Written] = {}

    def ratio(self, rank: int, ranks: int) -> float:
        """Return what a rank of so many reads, over what it needs, where each has its share of the rows."""
        read: dict[tuple[str, int], int] = {}
        needed = tensor = 0
        for component, specs in self._known:
            for spec in specs:
                rows = self._held[tensor].rows
                tensor += 1
                if not spec.shape:
                    continue
                count, width = spec.shape[0], spec.nbytes // spec.shape[0]
                each = -(-count // ranks)
                low, high = min(count, rank * each), min(count, (rank + 1) * each)
                needed += (high - low) * width
                for (begin, end), holders in zip(itertools.pairwise(rows.bounds), rows.holders, strict=True):
                    if low < high and begin < high and low < end:
                        for holder in holders:
                            read.update(self._read(holder, (component, spec.name), low, high, width))
        return sum(read.values()) / max(1, needed)

    def _read(self, rank: int, tensor: tuple[str, str], low: int, high: int, width: int) -> dict[tuple[str, int], int]:
        """Return the stretches with a digest that hold any of the rows, each with its size."""
        if tensor not in self._of(rank):
            return {}
        file, place, edges = self._of(rank)[tensor]
        first = place.offsets[0] if place.offsets else 0
        begin, end = max(low, first), min(high, first + place.spec.shape[0])
        if begin >= end:
            return {}
        at, stop = place.begin + (begin - first) * width, place.begin + (end - first) * width
        number = bisect.bisect_right(edges, at) - 1
        found: dict[tuple[str, int], int] = {}
        while number < len(edges) - 1 and edges[number] < stop:
            found[file, number] = edges[number + 1] - edges[number]
            number += 1
        return found

    def _of(self, rank: int) -> _Written:
        if rank not in self._written:
            how = formats.get("safetensors"), codecs.get("none"), LayoutOptions(by_rank=True)
            job, found = self._job, {}
            held = holdings(job, self._specs, rank)
            for shard in divide_by_rank(self._known, held, rank, job.ranks, *how).layout.shards:
                ends = {extent.offset + extent.nbytes for extent in shard.extents}
                cuts = {extent.offset + cut for extent in shard.extents for cut in extent.digest_boundaries}
                edges = sorted({0} | ends | cuts)
                for place in shard.placements:
                    whole = place.part_of or place.spec
                    found[shard.component, whole.name] = (shard.file, place, edges)
            self._written[rank] = found
        return self._written[rank]
