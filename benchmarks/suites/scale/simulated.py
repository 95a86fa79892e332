"""The product's own planning and merging, with ranks that are made up. Times are processor time: other programs on the
machine do not count."""

from __future__ import annotations

import json
import resource
import statistics
import time
from typing import Any

from asyncckpt import formats
from asyncckpt.codecs import codecs
from asyncckpt.manifest.json import file_to_json
from asyncckpt.plan import layout
from asyncckpt.plan.partition import divide
from asyncckpt.plan.per_rank_files import divide_by_rank, suits
from asyncckpt.ranks.merging import merge_trees
from asyncckpt.ranks.shared_files import merge_files
from asyncckpt.types import LayoutOptions
from benchmarks.suites.scale.models import HYBRID, JOBS, components, holdings

#: Parameters, and the pipeline stages that hold parts of them.
MERGES = ((4_800, 16), (19_200, 16), (100_000, 16), (19_200, 300))
#: Ranks, and the extents that each reports.
LEADERS = ((64, 999), (512, 999))
_RANK = 5
_FILES = 9
_EXTENT_BYTES = 1 << 20


def plans() -> list[dict[str, Any]]:
    """Plan a rank's part of each job's first save, in the layout that the product chooses for the job."""
    found: list[dict[str, Any]] = []
    options = LayoutOptions(by_rank=None)
    how = formats.get("safetensors"), codecs.get("none"), options
    for job in JOBS:
        known = components(job.shapes())
        held = holdings(job, [spec for _, specs in known for spec in specs], _RANK)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        by_rank = suits(known, held, options)
        if by_rank:
            part = divide_by_rank(known, held, _RANK, job.ranks, *how)
        else:
            part = divide(layout.plan(known, *how), held, _RANK, options.extent_bytes)
        seconds = time.process_time() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        extents = part.layout.extents()
        found.append(
            {
                "job": job.name,
                "by_rank": by_rank,
                "seconds": seconds,
                "grown_bytes": grown << 10,
                "tensors": len(held),
                "opened": sum(bool(shard.extents) for shard in part.layout.shards),
                "extents": len(extents),
                "median_extent_bytes": statistics.median(extent.nbytes for extent in extents),
                "nbytes": sum(extent.nbytes for extent in extents),
            }
        )
    return found


def balances(looked_at: int) -> list[dict[str, Any]]:
    """Compare what the ranks of a job write whose tensors lie on several ranks each: so many of them, over the
    mean."""
    found: list[dict[str, Any]] = []
    options = LayoutOptions(by_rank=True)
    for job in HYBRID:
        known = components(job.shapes())
        specs = [spec for _, specs in known for spec in specs]
        loads: list[int] = []
        for rank in range(0, job.ranks, job.ranks // looked_at):
            held = holdings(job, specs, rank)
            part = divide_by_rank(known, held, rank, job.ranks, formats.get("safetensors"), codecs.get("none"), options)
            loads.append(sum(shard.nbytes for shard in part.layout.shards))
        mean = sum(spec.nbytes for spec in specs) / job.ranks
        found.append({"job": job.name, "busiest_over_mean": max(loads) / mean, "least_over_mean": min(loads) / mean})
    return found


def merges() -> list[dict[str, Any]]:
    """Unite the trees that the optimizers of pipeline stages report."""
    found: list[dict[str, Any]] = []
    for parameters, stages in MERGES:
        trees = [(stage, _tree(stage, parameters // stages)) for stage in range(stages)]
        began = time.process_time()
        united = merge_trees("optimizer", "optimizer", trees, {})
        seconds = time.process_time() - began
        if not isinstance(united, dict) or len(united["state"]) != parameters:  # type: ignore[arg-type]
            raise LookupError("parameters were lost")
        found.append({"parameters": parameters, "stages": stages, "seconds": seconds})
    return found


def leaders() -> list[dict[str, Any]]:
    """Merge what ranks report of the files that they write together, and make the text that the manifest has of it."""
    found: list[dict[str, Any]] = []
    for ranks, extents in LEADERS:
        reports = [_report(rank, ranks, extents) for rank in range(ranks)]
        began = time.process_time()
        records = merge_files(reports, 1)
        text = json.dumps([file_to_json(record) for record in records], separators=(",", ":"))
        seconds = time.process_time() - began
        found.append({"ranks": ranks, "extents": extents, "seconds": seconds, "nbytes": len(text)})
    return found


def _report(rank: int, ranks: int, extents: int) -> dict[str, Any]:
    """Return the rows of one rank, whose extents lie between those of the others in each of a few files."""
    files = []
    for number in range(_FILES):
        count = extents // _FILES
        rows = [
            [(at * ranks + rank) * _EXTENT_BYTES, _EXTENT_BYTES, f"{rank * count + at:032x}"] for at in range(count)
        ]
        nbytes = count * ranks * _EXTENT_BYTES
        files.append({"name": f"model-{number:05d}.safetensors", "nbytes": nbytes, "extents": rows})
    return {"files": files}


def _tree(stage: int, count: int) -> Any:
    names = [f"layers.{stage}.{number}.weight" for number in range(count)]
    state = {
        name: {key: {"$": "tensor", "v": f"state.{name}.{key}"} for key in ("step", "exp_avg", "exp_avg_sq")}
        for name in names
    }
    group = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "params": names}
    return {"state": state, "param_groups": [group]}
