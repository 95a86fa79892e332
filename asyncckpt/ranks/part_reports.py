"""Where each rank writes files of its own, it says which boxes of which tensors lie in them: to rank 0, which makes one
manifest of all that, or, in a large job, in a part of the manifest that it writes itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncckpt import jsontree
from asyncckpt.codecs.digests import DEFAULT, hex_length
from asyncckpt.codecs.digests import get as get_digest
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import SaveFailed
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.parse import NUMBER_LIMIT
from asyncckpt.manifest.parts import ListedPart, Parts, encode_part, part_name
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.manifest.spread import Spread
from asyncckpt.plan.partition import SpreadTensors
from asyncckpt.protocols import PendingDirectory
from asyncckpt.types import JsonValue, Layout

#: Component → tensor → rows ``[offsets, shape, file, begin, end]``; offsets are None where all of the tensor is there.
Boxes = dict[str, dict[str, list[Any]]]


def boxes_of(layout: Layout, spread: SpreadTensors) -> Boxes:
    """List what this rank writes of the tensors that are spread over ranks. The layout keeps the list."""
    kept: Boxes | None = layout.cache.get("boxes")
    if kept is not None:
        return kept
    found: Boxes = {}
    for shard in layout.shards:
        if shard.component not in spread.tensors:
            continue
        here = found.setdefault(shard.component, {})
        for place in shard.placements:
            box = [list(place.offsets), list(place.spec.shape), shard.file, place.begin, place.end]
            if place.part_of is None:
                here.setdefault(place.spec.name, []).append([None, *box[1:]])
            else:
                here.setdefault(place.part_of.name, []).append(box)
    layout.cache["boxes"] = found
    return found


def write_part(
    save: SaveTransaction,
    directory: PendingDirectory,
    rank: int,
    spread: SpreadTensors,
    files: Sequence[FileRecord],
    own: Mapping[str, Any],
) -> list[Any]:
    """Write this rank's part of the manifest, durably but for its name, and return its row for the report: its size,
    its digest, and the files that it describes. ``files``: those that the rank has written. ``own``: its own
    components, as the manifest lists them. Blocks on the disk."""
    draft, contents = save.contents.draft, save.contents
    data = encode_part(
        step=draft.step,
        attempt=draft.attempt,
        rank=rank,
        files=[manifest.file_to_json(record) for record in files],
        boxes=boxes_of(contents.layout, spread),
        components=own,
        values={name: contents.trees[name] for name in own},
    )
    directory.write_small({part_name(rank): data})
    holders = {shard.file: shard.component for shard in contents.layout.shards}
    return [len(data), save.digest(data), [[one.name, one.nbytes, holders[one.name]] for one in files]]


def own_rows(contents: Contents, own: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what rank 0 needs to know of components that this rank has of its own: their kinds, the digests of their
    plain values, and whether they have tensors."""
    digest = get_digest(DEFAULT)
    return {
        name: [entry["kind"], digest(jsontree.dumps(contents.trees[name])), bool(entry["tensors"])]
        for name, entry in own.items()
    }


def merge_boxes(contents: Contents, reports: Sequence[Mapping[str, Any]], spread: SpreadTensors) -> Contents:
    """Put the boxes that all ranks report together, as one manifest lists them. Raises ``SaveFailed`` where they do not
    make whole tensors."""
    found: dict[str, dict[str, JsonValue]] = {name: {} for name in spread.tensors}
    reported: dict[tuple[str, str], list[Any]] = {}
    for report in reports:
        for name, tensors in report["boxes"].items():
            for tensor, rows in tensors.items():
                reported.setdefault((name, tensor), []).extend(rows)
    for name, tensors in spread.tensors.items():
        for tensor, described in tensors.items():
            spec, rows = described.spec, reported.get((name, tensor), [])
            if sum(row[4] - row[3] for row in rows) != spec.nbytes or not rows:
                raise SaveFailed(
                    f"step {contents.draft.step}: the ranks' parts of {name}.{tensor} do not make a whole; nothing was "
                    f"published"
                )
            if rows[0][0] is None:
                found[name][tensor] = [spec.dtype, list(spec.shape), *rows[0][2:]]
            else:
                boxes: list[JsonValue] = sorted(rows)
                found[name][tensor] = {"dtype": spec.dtype, "shape": list(spec.shape), "boxes": boxes}
    return replace(contents, spread=found)


def merge_parts(
    contents: Contents, reports: Sequence[Mapping[str, Any]], spread: SpreadTensors, own_of_lead: frozenset[str]
) -> tuple[Contents, Parts]:
    """Make the root of a manifest whose parts the ranks have written. ``own_of_lead``: the components that rank 0 has
    of its own; another rank's is left out where it is the same."""
    draft = contents.draft
    listed = [_listed(rank, report["part"], draft) for rank, report in enumerate(reports)]
    spreads = [Spread(rows.bounds, rows.holders) for rows in spread.spreads]
    parts = Parts(
        listed,
        spreads,
        where=f"{draft.name}/{manifest.FILE_NAME}",
        step=draft.step,
        attempt=draft.attempt,
        digest=draft.digest,
        read=None,
    )
    others: dict[str, JsonValue] = {}
    first = reports[0]["own_rows"]
    for rank, report in enumerate(reports):
        for name, (kind, digest, has_tensors) in report["own_rows"].items():
            base = name.removesuffix(f"+{rank}") if rank else name
            same = rank and base in own_of_lead and not has_tensors and first[base][1] == digest
            if not same:
                others[name] = {"kind": kind, "part": rank}
    kinds = {name: kind for name, kind in contents.kinds.items() if name in spread.tensors}
    return replace(contents, kinds=kinds, others=others, spread=_rows(contents.layout, spread)), parts


def _listed(rank: int, row: Any, draft: Manifest) -> ListedPart:
    """Return what a rank reports of its part. Raises ``SaveFailed`` where no reader would take it."""
    nbytes, digest, files = row
    sizes = [nbytes, *(size for _, size, _ in files)]
    if len(digest) != hex_length(draft.digest) or not all(0 <= size < NUMBER_LIMIT for size in sizes):
        raise SaveFailed(f"step {draft.step}: rank {rank} reports a part of the manifest that cannot be: {row!r:.200}")
    return ListedPart(nbytes, digest, tuple((name, size, component) for name, size, component in files))


def _rows(layout: Layout, spread: SpreadTensors) -> Mapping[str, Mapping[str, JsonValue]]:
    """Return the rows of tensors in the root, which are the same at every save: the layout keeps them."""
    kept: Mapping[str, Mapping[str, JsonValue]] | None = layout.cache.get("spread rows")
    if kept is None:
        found: dict[str, dict[str, JsonValue]] = {}
        for name, tensors in spread.tensors.items():
            found[name] = {}
            for tensor, one in tensors.items():
                row: dict[str, JsonValue] = {
                    "dtype": one.spec.dtype,
                    "shape": list(one.spec.shape),
                    "spread": one.spread,
                }
                found[name][tensor] = row | ({"copies": list(one.copies)} if one.copies is not None else {})
        kept = layout.cache["spread rows"] = found
    return kept
