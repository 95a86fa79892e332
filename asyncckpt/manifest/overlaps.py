"""No two tensors of a manifest may share a byte of a file, and no two boxes of a tensor an element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from asyncckpt.manifest.records import BoxedRecord, BoxRecord, ChunkedRecord, ComponentRecord
from asyncckpt.manifest.spread import OwnComponent, SpreadRecord
from asyncckpt.manifest.table import Numbers, TensorTable, overlap

#: So many pairs of boxes of one tensor are compared at most: far more than a grid of a hundred thousand boxes needs.
_MAX_COMPARED: Final = 20_000_000


def apart(boxes: Sequence[BoxRecord]) -> bool:
    """Return whether no two boxes share an element. It sweeps along the dimension in which the boxes begin at the most
    places, and gives up, with False, where more pairs than ``_MAX_COMPARED`` would have to be compared."""
    solid = [box for box in boxes if box.begin < box.end]
    if len(solid) < 2 or not solid[0].shape:
        return len(solid) < 2  # a tensor without dimensions has room for one box
    along = max(range(len(solid[0].shape)), key=lambda i: len({box.offsets[i] for box in solid}))
    compared = 0
    open_boxes: list[BoxRecord] = []
    for box in sorted(solid, key=lambda box: box.offsets[along]):
        begin = box.offsets[along]
        open_boxes = [other for other in open_boxes if other.offsets[along] + other.shape[along] > begin]
        compared += len(open_boxes)
        if compared > _MAX_COMPARED:
            return False
        for other in open_boxes:
            ranges = zip(box.offsets, box.shape, other.offsets, other.shape, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in ranges):
                return False
        open_boxes.append(box)
    return True


def overlap_problem(components: Mapping[str, ComponentRecord]) -> str | None:
    """Say, as what "The manifest …" goes on with, where tensors share bytes of a file, or an extent is two chunks; None
    where none do. What only parts describe is not looked at."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    arrays: dict[str, list[tuple[Numbers, Numbers]]] = {}
    taken: set[tuple[str, int]] = set()
    for component in components.values():
        if not isinstance(component, OwnComponent) and isinstance(component.tensors, TensorTable):
            for file, begins, ends in component.tensors.spans():
                arrays.setdefault(file, []).append((begins, ends))
            continue
        for tensor in () if isinstance(component, OwnComponent) else component.tensors.values():
            if isinstance(tensor, SpreadRecord):
                continue  # its parts say where it lies
            if isinstance(tensor, ChunkedRecord):
                mine = [(part.file, extent) for part in tensor.parts for extent in part.extents]
                if len(set(mine)) != len(mine) or not taken.isdisjoint(mine):
                    return "has an extent that is two chunks"
                taken.update(mine)
                continue
            for place in tensor.boxes if isinstance(tensor, BoxedRecord) else (tensor,):
                if place.begin < place.end:
                    ranges.setdefault(place.file, []).append((place.begin, place.end))
    for file, spans in ranges.items():
        begins, ends = np.array(spans, dtype=np.int64).T
        arrays.setdefault(file, []).append((begins, ends))
    if not arrays.keys().isdisjoint(file for file, _ in taken):
        return "has a file with whole tensors and with chunks"
    for file, found in arrays.items():
        if overlap(found):
            return f"has tensors in {file!r} that overlap"
    return None
