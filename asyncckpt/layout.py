"""Which byte range of which shard each tensor goes to: a pure function of the global names, shapes and dtypes.

Tensors are laid out by descending item size, then by name: each then starts at a multiple of its item size without
padding (the safetensors format has no holes), and the result does not depend on the order anyone built a dict in.
A tensor is never split over shards; one larger than ``shard_bytes`` has a shard of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from asyncckpt.dtypes import ITEM_BYTES
from asyncckpt.errors import InvalidOption
from asyncckpt.protocols import ALIGNMENT_BYTES, Extent, Layout, Placement, Segment, Shard, ShardFormat, TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutOptions:
    """``shard_bytes``: data bytes after which a new shard begins. ``extent_bytes``: the unit of staging, hashing and
    writing, a multiple of 4096."""

    shard_bytes: int = 4 << 30
    extent_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if type(self.shard_bytes) is not int or self.shard_bytes < 1:
            raise InvalidOption(f"shard_bytes must be a whole number of bytes >= 1, not {self.shard_bytes!r}")
        if type(self.extent_bytes) is not int or self.extent_bytes < 1 or self.extent_bytes % ALIGNMENT_BYTES:
            raise InvalidOption(f"extent_bytes must be a positive multiple of {ALIGNMENT_BYTES}")


Components = tuple[tuple[str, tuple[TensorSpec, ...]], ...]


def plan(components: Components, shard_format: ShardFormat, options: LayoutOptions) -> Layout:
    """The layout of these components' tensors; pieces are numbered in the order given. Pure; no I/O.

    Components without tensors get no shard. Takes about a second for 100,000 tensors; ``LayoutCache`` keeps the
    result for the saves that follow.
    """
    shards: list[Shard] = []
    first_piece = 0
    for component, specs in components:
        order = sorted(range(len(specs)), key=lambda i: (-ITEM_BYTES[specs[i].dtype], specs[i].name))
        groups = _split(order, specs, options.shard_bytes)
        for number, group in enumerate(groups, 1):
            file = f"{component}-{number:05d}-of-{len(groups):05d}{shard_format.suffix}"
            shards.append(_shard(len(shards), file, component, group, specs, first_piece, shard_format, options))
        first_piece += len(specs)
    return Layout(tuple(shards), sum(shard.nbytes for shard in shards), fingerprint(components))


def fingerprint(components: Components) -> str:
    """A digest of names, dtypes and shapes: equal on every rank that holds the same global state."""
    text = "\n".join(
        f"{component}\0{spec.name}\0{spec.dtype}\0{spec.shape}" for component, specs in components for spec in specs
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _split(order: Sequence[int], specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[int]]:
    groups: list[list[int]] = []
    filled = 0
    for index in order:
        nbytes = specs[index].nbytes
        if not groups or (filled + nbytes > shard_bytes and filled):
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += nbytes
    return groups


def _shard(
    number: int,
    file: str,
    component: str,
    group: Sequence[int],
    specs: Sequence[TensorSpec],
    first_piece: int,
    shard_format: ShardFormat,
    options: LayoutOptions,
) -> Shard:
    chosen = [specs[index] for index in group]
    header, begins, nbytes = shard_format.image(chosen)
    placements = tuple(Placement(spec, begin, begin + spec.nbytes) for spec, begin in zip(chosen, begins, strict=True))
    size = options.extent_bytes
    segments: list[list[Segment]] = [[] for _ in range(-(-nbytes // size))]
    for index, placement in zip(group, placements, strict=True):
        position = placement.begin
        while position < placement.end:
            extent = position // size
            stop = min(placement.end, (extent + 1) * size)
            segments[extent].append(
                Segment(first_piece + index, position - placement.begin, position - extent * size, stop - position)
            )
            position = stop
    extents = tuple(
        Extent(
            number,
            i * size,
            min(size, nbytes - i * size),
            header[i * size : (i + 1) * size],
            tuple(segments[i]),
        )
        for i in range(len(segments))
    )
    return Shard(file, component, nbytes, placements, extents)


class LayoutCache:
    """Keeps the latest layout: in steady state, a save's layout is one comparison. Not thread-safe."""

    def __init__(self, shard_format: ShardFormat, options: LayoutOptions) -> None:
        self._format = shard_format
        self._options = options
        self._kept: dict[Components, Layout] = {}

    def get(self, components: Components) -> Layout:
        layout = self._kept.get(components)
        if layout is None:
            layout = plan(components, self._format, self._options)
            while len(self._kept) >= 4:  # full and weights-only saves, before and after the optimizer has state
                self._kept.pop(next(iter(self._kept)))
            self._kept[components] = layout
        return layout
