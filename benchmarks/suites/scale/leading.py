"""Rank 0's work for one save of a large job whose manifest is in parts, and what a rank reads to restore from it: the
product's own code, with reports that are made up."""

from __future__ import annotations

import itertools
import json
import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from asyncckpt import formats
from asyncckpt.codecs import codecs, digests
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.draft import Contents, components_json
from asyncckpt.manifest.parts import encode_part, part_name
from asyncckpt.manifest.readable import check_readable
from asyncckpt.manifest.records import ExtentRecord, FileRecord
from asyncckpt.memory.gc_pause import gc_paused
from asyncckpt.plan.partition import Division
from asyncckpt.plan.per_rank_files import divide_by_rank
from asyncckpt.ranks.part_reports import boxes_of, merge_parts
from asyncckpt.ranks.replicas import MOST_TENSORS
from asyncckpt.ranks.report_checks import check_reports
from asyncckpt.ranks.reports import slowest_ranks
from asyncckpt.types import LayoutOptions
from benchmarks.suites.light.counting import Counter
from benchmarks.suites.ranks.simulation import contents as simulated_contents
from benchmarks.suites.scale.models import Job, components, holdings, llama

#: Ranks, and the extents that each has written.
SIZES = ((64, 1000), (512, 1000), (4096, 1000), (4096, 4000))
#: Takes a second.
QUICK = ((64, 100),)
_SAVES = 3
_HEX = 32


def leaders(sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return what each save costs rank 0: the processor time, what a thread that counts in pure Python lost to it, at
    once and in all, and the memory; and what a rank needs to open the checkpoint."""
    return [_lead(Job("", lambda: llama(126, 16_384, 53_248, 128_256), ranks), extents) for ranks, extents in sizes]


def _lead(job: Job, extents: int) -> dict[str, Any]:
    known = components(job.shapes())
    specs = [spec for _, found in known for spec in found]
    how = formats.get("safetensors"), codecs.get("none"), LayoutOptions(by_rank=True)
    division = divide_by_rank(known, holdings(job, specs, 0), 0, job.ranks, *how)
    kinds = {"model": "module", "optimizer": "optimizer"}
    contents = simulated_contents({name: kinds[name] for name, _ in known}, division.layout, job.ranks)
    part = _part(division, contents, extents)
    seconds: list[float] = []
    lost: list[float] = []
    longest: list[float] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = b""
    for _ in range(_SAVES):
        messages = [_message(rank, contents, part) for rank in range(job.ranks)]
        done: list[tuple[float, bytes]] = []
        thread = threading.Thread(target=lambda: done.append(_merged(messages, contents, division)))  # noqa: B023
        with Counter() as counter:
            thread.start()
            thread.join()
            counted = counter.stretch()
        seconds.append(done[0][0])
        data = done[0][1]
        lost.append(counted.lost_seconds)
        longest.append(counted.longest_seconds)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "ranks": job.ranks,
        "extents": extents,
        "first_seconds": seconds[0],
        "seconds": seconds[-1],
        "lost_seconds": lost[-1],
        "longest_seconds": max(longest[1:]),
        "grown_bytes": grown << 10,
        "nbytes": len(data),
        "part_bytes": len(part),
        "open_seconds": _opened(data, part, known[0][1][0].name),
    }


def _part(division: Division, contents: Contents, extents: int) -> bytes:
    """Return the part of rank 0, with about so many extents in all."""
    total = sum(shard.nbytes for shard in division.layout.shards)
    files: list[FileRecord] = []
    for shard in division.layout.shards:
        count = max(1, extents * shard.nbytes // total)
        edges = [shard.nbytes * number // count for number in range(count + 1)]
        rows = [ExtentRecord(begin, end - begin, f"{begin:0{_HEX}x}") for begin, end in itertools.pairwise(edges)]
        files.append(FileRecord(shard.file, shard.nbytes, tuple(rows)))
    assert division.spread is not None
    return encode_part(
        step=1,
        attempt=contents.draft.attempt,
        rank=0,
        files=[manifests.file_to_json(file) for file in files],
        boxes=boxes_of(division.layout, division.spread),
        components={"rng": {"kind": "stateful", "tensors": {}, "aliases": {}}},
        values={"rng": {"state": [0] * 625}},
    )


def _message(rank: int, contents: Contents, part: bytes) -> str:
    """Return the text of a rank's report."""
    draft = contents.draft
    empty = ("trees", "aliases", "descriptions", "replicas", "groups", "values", "orders", "own")
    shards = contents.layout.shards
    files = [[one.file.replace("rank-00000", f"rank-{rank:05d}"), one.nbytes, one.component] for one in shards]
    digest = digests.get("xxh3-128")(part) if rank == 0 else f"{rank:0{_HEX}x}"
    body: dict[str, Any] = {name: {} for name in empty} | {
        "error": None,
        "step": draft.step,
        "kind": draft.kind,
        "layout": draft.layout,
        "attempt": draft.attempt,
        "names": [],
        "files": [],
        "damaged": "",
        "held_back": [],
        "compared_with": "",
        "sample": json.dumps({str(index): f"{index:016x}" for index in range(MOST_TENSORS)}),
        "sampled": {"0-4095-1": "0" * 16},
        "phases": [0.1, 1.0],
        "part": [len(part), digest, files],
        "own_rows": {f"rng+{rank}" if rank else "rng": ["stateful", f"{rank:0{_HEX}x}", False]},
    }
    return json.dumps(body)


def _merged(messages: Sequence[str], contents: Contents, division: Division) -> tuple[float, bytes]:
    """Do what rank 0 does once the reports are there; return how long its thread ran, and the manifest."""
    began = time.thread_time()
    with gc_paused():  # as where the messages are read
        reports = [json.loads(message) for message in messages]
        check_reports(reports, contents.draft, None)
        slowest_ranks(1, reports, {})
        assert division.spread is not None
        merged, parts = merge_parts(contents, reports, division.spread, frozenset({"rng"}))
        del reports
    draft = replace(merged.draft, files=parts.files(), parts=parts)
    text = components_json(merged, {})
    data = manifests.encode(draft, components_json=text)
    check_readable(draft, data, text, merged.layout.cache)
    return time.thread_time() - began, data


def _opened(data: bytes, part: bytes, tensor: str) -> float:
    """Return how long a rank takes to parse the root, and its own part, and to find a tensor there."""

    def read(name: str, _limit: int) -> bytes:
        if name != part_name(0):
            raise LookupError(f"{name} was read, and is not this rank's")
        return part

    began = time.process_time()
    manifest = manifests.decode(data, "manifest.json", read=read)
    record = manifest.components["model"].tensors[tensor]
    (box,) = record.boxes_in(0, 1)  # type: ignore[union-attr]
    next(one for one in manifest.files if one.name == box.file).extents  # noqa: B018
    return time.process_time() - began
