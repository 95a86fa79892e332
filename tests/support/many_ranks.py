"""Checkpoints of jobs with more ranks than a test can start, made by the product's own planning and merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from faults.fuzz.fuzz_checkpoints import MemoryReader

from asyncckpt import formats
from asyncckpt.codecs import codecs, digests
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.draft import components_json
from asyncckpt.manifest.parts import encode_part, part_name
from asyncckpt.plan.per_rank_files import divide_by_rank
from asyncckpt.ranks.part_reports import boxes_of, merge_parts
from asyncckpt.state.rank_names import rank_name
from asyncckpt.types import LayoutOptions, RowOwners, TensorSpec
from benchmarks.suites.ranks import simulation


class CountingReader(MemoryReader):
    """Counts how often each small file was read."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.read: dict[str, int] = {}

    def read_small(self, file: str, limit: int) -> bytes:
        self.read[file] = self.read.get(file, 0) + 1
        return super().read_small(file, limit)

    def parts(self) -> dict[str, int]:
        """Return how often each part of the manifest was read, by name."""
        return {name: count for name, count in self.read.items() if name.startswith("part-")}


def values_of(spec: TensorSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the values that a tensor is given: each says where it is."""
    count = spec.nbytes // 4
    return (np.arange(count, dtype=np.float32) + sum(spec.name.encode())).reshape(spec.shape)


def in_parts(
    specs: Sequence[TensorSpec], held: Sequence[RowOwners], ranks: int, *, own: bool = False
) -> CountingReader:
    """Return the files of a checkpoint in parts: a module ``model`` of fp32 tensors that ranks hold as ``held`` says.
    ``own``: each rank has a component ``loader`` of its own, too."""
    how = formats.get("safetensors"), codecs.get("none"), LayoutOptions(extent_bytes=1 << 20)
    digest = digests.get("xxh3-128")
    files: dict[str, bytes] = {}
    reports: list[dict[str, Any]] = []
    contents = division = None
    for rank in range(ranks):
        pairs = enumerate(zip(specs, held, strict=True))
        holdings = [simulation.holding(one, rows, number, rank) for number, (one, rows) in pairs]
        mine = divide_by_rank((("model", tuple(specs)),), holdings, rank, ranks, *how)
        assert mine.spread is not None
        if contents is None:
            contents, division = simulation.contents({"model": "module"}, mine.layout, ranks), mine
        records = []
        for shard in mine.layout.shards:
            data = bytearray(shard.nbytes)
            data[: len(shard.header)] = shard.header
            for place in shard.placements:
                whole = values_of(place.part_of or place.spec)
                first = place.offsets[0] if place.part_of else 0
                rows = whole[first : first + place.spec.shape[0]] if place.spec.shape else whole
                data[place.begin : place.end] = rows.tobytes()
            files[shard.file] = bytes(data)
            records.append(manifests.whole_file(shard.file, bytes(data), digest))
        plain = {"kind": "plain", "tensors": {}, "aliases": {}}
        entries = {rank_name("loader", rank): plain} if own else {}
        part = encode_part(
            step=1,
            attempt=contents.draft.attempt,
            rank=rank,
            files=[manifests.file_to_json(record) for record in records],
            boxes=boxes_of(mine.layout, mine.spread),
            components=entries,
            values={name: {"position": rank} for name in entries},
        )
        files[part_name(rank)] = part
        listed = [[record.name, record.nbytes, "model"] for record in records]
        own_rows = {name: ["plain", digest(b"%d" % rank), False] for name in entries}
        reports.append({"part": [len(part), digest(part), listed], "own_rows": own_rows})
    assert contents is not None
    assert division is not None
    assert division.spread is not None
    merged, parts = merge_parts(contents, reports, division.spread, frozenset({"loader"} if own else ()))
    files["state.json"] = b'{"model":{}}\n'
    beside = manifests.whole_file("state.json", files["state.json"], digest)
    draft = replace(merged.draft, files=(beside, *parts.files()), parts=parts)
    files["manifest.json"] = manifests.encode(draft, components_json=components_json(merged, {}))
    return CountingReader(files)
