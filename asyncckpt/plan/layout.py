"""The layout says which byte range of which shard each tensor goes to. It is a pure function of the global names,
shapes and dtypes (and of which tensors are frozen). The formats fill one component's shards; this numbers and keeps
them."""

from __future__ import annotations

import hashlib
from collections import deque

from asyncckpt.protocols import Codec, ShardFormat
from asyncckpt.types import Layout, LayoutOptions, ShardFile, TensorSpec

Components = tuple[tuple[str, tuple[TensorSpec, ...]], ...]


def plan(components: Components, shard_format: ShardFormat, codec: Codec, options: LayoutOptions) -> Layout:
    """Lay out these components' tensors; pieces are numbered in the order given. Pure; no I/O.

    Components without tensors get no shard. Takes about a second for 100,000 tensors; ``LayoutCache`` keeps the
    result for the saves that follow.
    """
    shards: list[ShardFile] = []
    first_piece = 0
    for component, specs in components:
        shards += shard_format.shards(component, specs, first_piece, len(shards), codec, options)
        first_piece += len(specs)
    return Layout(tuple(shards), sum(shard.nbytes for shard in shards), fingerprint(components))


def fingerprint(components: Components) -> str:
    """Digest names, dtypes and shapes: the result is equal on every rank that holds the same global state."""
    text = "\n".join(
        f"{component}\0{spec.name}\0{spec.dtype}\0{spec.shape}" for component, specs in components for spec in specs
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class LayoutCache:
    """Keeps the latest layouts. In steady state, finding one costs a comparison of objects, not a hash of every name
    and shape: ``capture`` gives the same ``TensorSpec`` objects save after save. Not thread-safe."""

    def __init__(self, shard_format: ShardFormat, codec: Codec, options: LayoutOptions) -> None:
        self._format = shard_format
        self._codec = codec
        self._options = options
        # full and weights-only saves, before and after the optimizer has state
        self._kept: deque[tuple[Components, Layout]] = deque(maxlen=4)

    def get(self, components: Components) -> Layout:
        layout = next((kept for known, kept in self._kept if known == components), None)
        if layout is None:
            layout = plan(components, self._format, self._codec, self._options)
            self._kept.append((components, layout))
        return layout
