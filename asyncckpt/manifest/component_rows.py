"""What the manifest says of components and their tensors, as values for JSON: of a layout, and of records."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from asyncckpt.manifest.records import (
    BoxedRecord,
    ChunkedRecord,
    ComponentRecord,
    PartRecord,
    StoredTensor,
    TensorRecord,
)
from asyncckpt.manifest.spread import SpreadRecord, boxes_in_each
from asyncckpt.types import Chunking, ComponentSnapshot, JsonValue, Layout


def components_of(
    layout: Layout,
    kinds: Mapping[str, str],
    aliases: Mapping[str, Mapping[str, str]],
    descriptions: Mapping[str, Mapping[str, JsonValue]],
    orders: Mapping[str, Sequence[int]],
) -> Any:
    """Return the manifest's ``components`` for a layout, ``{name: {kind, tensors, aliases}}`` and what ``describe``
    adds, as values for JSON. The extent with index ``i`` of a shard in the layout became the extent with index
    ``orders[file][i]`` of its file."""
    body: dict[str, Any] = {
        name: {"kind": kind, "tensors": {}, "aliases": dict(aliases.get(name, {})), **descriptions.get(name, {})}
        for name, kind in kinds.items()
    }
    for shard in layout.shards:
        tensors = body[shard.component]["tensors"]
        for placement in shard.placements:
            spec, whole = placement.spec, placement.part_of
            if whole is None:
                tensors[spec.name] = [spec.dtype, list(spec.shape), shard.file, placement.begin, placement.end]
                continue
            boxed = tensors.setdefault(whole.name, {"dtype": whole.dtype, "shape": list(whole.shape), "boxes": []})
            box = [list(placement.offsets), list(spec.shape), shard.file, placement.begin, placement.end]
            bisect.insort(boxed["boxes"], box)
        for run in shard.runs:
            row = tensors.setdefault(run.tensor.spec.name, _chunked_row(run.tensor))
            if run.count:
                chosen = orders[shard.file][run.first : run.first + run.count]
                row["parts"].append(_part_row(PartRecord(shard.file, tuple(chosen))))
    return body


def describe(component: ComponentSnapshot | ComponentRecord) -> dict[str, JsonValue]:
    """Return what the manifest says of a component beside its kind, tensors and aliases, where there is any of it: the
    live object's class, and the strides of tensors that are not row-major in memory."""
    found: dict[str, JsonValue] = {}
    if component.type_name:
        found["class"] = component.type_name
    if component.strides:
        found["strides"] = {name: list(strides) for name, strides in component.strides.items()}
    return found


def _chunked_row(tensor: Chunking | ChunkedRecord) -> dict[str, Any]:
    spec = tensor.spec if isinstance(tensor, Chunking) else tensor
    return {
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "chunk": tensor.chunk_bytes,
        "run": tensor.run_bytes,
        "padded": tensor.padded,
        "parts": [],
    }


def _part_row(part: PartRecord) -> list[Any]:
    first, count = part.extents[0], len(part.extents)
    if part.extents == tuple(range(first, first + count)):
        return [part.file, first, count]
    return [part.file, list(part.extents)]


def component_rows(components: Mapping[str, ComponentRecord]) -> Any:
    """Return the manifest's ``components`` for records, as ``components_of`` does for a layout. Boxes that parts of a
    manifest describe are read from them."""
    named = [(name, n, tensor) for name, component in components.items() for n, tensor in component.tensors.items()]
    spread = [(name, n, tensor) for name, n, tensor in named if isinstance(tensor, SpreadRecord)]
    boxes = boxes_in_each([(tensor, 0, tensor.rows) for _, _, tensor in spread])
    listed = {(name, n): tensor.listed(mine) for (name, n, tensor), mine in zip(spread, boxes, strict=True)}
    return {
        name: {
            "kind": component.kind,
            "tensors": {n: _tensor_json(listed.get((name, n), one)) for n, one in component.tensors.items()},
            "aliases": dict(component.aliases),
            **describe(component),
        }
        for name, component in components.items()
    }


def _tensor_json(tensor: StoredTensor) -> Any:
    if isinstance(tensor, TensorRecord):
        return [tensor.dtype, list(tensor.shape), tensor.file, tensor.begin, tensor.end]
    if isinstance(tensor, BoxedRecord):
        rows = [[list(box.offsets), list(box.shape), box.file, box.begin, box.end] for box in tensor.boxes]
        return {"dtype": tensor.dtype, "shape": list(tensor.shape), "boxes": rows}
    return _chunked_row(tensor) | {"parts": [_part_row(part) for part in tensor.parts]}
