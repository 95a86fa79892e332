"""Tensors are cut into chunks, which are contiguous in row-major order, and each chunk becomes an extent of a shard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES
from asyncckpt.codecs.dtypes import ITEM_BYTES, PLANE_BYTES
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import Codec
from asyncckpt.types import FRAME_HEADER_BYTES, Chunking, Extent, Segment, ShardFile, TensorSpec


@dataclass(frozen=True, slots=True)
class ShardCut:
    """``ShardCut`` is one shard of a chunked tensor: its coordinates in the grid of shards, and the chunks
    ``[first, last)`` that it holds."""

    coordinates: tuple[int, ...]
    first: int
    last: int


def flat(spec: TensorSpec, chunk_bytes: int) -> Chunking:
    """Cut the tensor into chunks of ``chunk_bytes`` without regard to its shape; the last chunk may be shorter."""
    return Chunking(spec, chunk_bytes, spec.nbytes, False, (), ())


def grid(spec: TensorSpec, chunk_bytes: int, shard_bytes: int) -> Chunking:
    """Cut the tensor into a regular grid, as zarr has it, of contiguous chunks of at most ``chunk_bytes``, in shards of
    at most ``shard_bytes``, though never less than one chunk.

    A chunk spans whole trailing axes, a part of one axis, and one index of each axis before it. A chunk at the edge of
    the array is padded; the axis is cut evenly, so that there is little to pad.
    """
    item = ITEM_BYTES[spec.dtype]
    shape = spec.shape
    if not spec.nbytes:
        whole = tuple(max(1, size) for size in shape)
        return Chunking(spec, 0, 0, True, whole, whole)
    axis, chunk = _block(shape, item, chunk_bytes)
    inner = item * math.prod(shape[axis + 1 :])
    chunk_nbytes = inner * chunk[axis] if shape else item
    run = inner * shape[axis] if shape else item
    shard_axis, shard = _block(shape, item, max(shard_bytes, chunk_nbytes))
    if shape:
        rounded = -(-shape[axis] // chunk[axis]) * chunk[axis]
        if shard_axis == axis:  # shards cut the axis that chunks cut, so each must hold whole chunks of it
            most = max(1, shard_bytes // chunk_nbytes) * chunk[axis]
            shard = (*shard[:axis], min(rounded, most), *shard[axis + 1 :])
        elif shard_axis < axis:
            shard = (*shard[:axis], rounded, *shard[axis + 1 :])
    return Chunking(spec, chunk_nbytes, run, True, chunk, shard)


def chunk_count(tensor: Chunking) -> int:
    """Return how many chunks the tensor has: 0 where it has no elements."""
    if not tensor.spec.nbytes:
        return 0
    return tensor.spec.nbytes // tensor.run_bytes * -(-tensor.run_bytes // tensor.chunk_bytes)


def shard_cuts(tensor: Chunking) -> Iterator[ShardCut]:
    """Yield the shards of a grid, in row-major order. Each holds consecutive chunks, which come first in its index."""
    total = chunk_count(tensor)
    shape, shard = tensor.spec.shape, tensor.shard_shape
    if not total:
        return
    counts = [-(-size // part) for size, part in zip(shape, shard, strict=True)]
    # axes before this one are cut into ones, axes after it are whole
    axis = next((axis for axis, part in enumerate(shard) if part > 1), max(0, len(shard) - 1))
    leading = math.prod(shape[:axis])
    per_leading, per_shard = total // leading, inner_count(tensor)
    for number in range(math.prod(counts)):
        lead, part = divmod(number, counts[axis] if counts else 1)
        first = lead * per_leading + part * per_shard
        yield ShardCut(_coordinates(number, counts), first, min(first + per_shard, (lead + 1) * per_leading))


def inner_count(tensor: Chunking) -> int:
    """Return how many entries the index of a shard has: one for each chunk of the whole shard shape, also for those
    past the array's edge."""
    return math.prod(part // size for part, size in zip(tensor.shard_shape, tensor.chunk_shape, strict=True))


def extents(tensor: Chunking, piece: int, shard: int, first: int, last: int, codec: Codec) -> list[Extent]:
    """Return the chunks ``[first, last)`` as extents of the shard with index ``shard``; their bytes come from the
    snapshot's piece with index ``piece``. With codec ``none`` they are written as they are, at aligned offsets."""
    encoded = codec.name != "none"
    lead = FRAME_HEADER_BYTES if encoded else 0
    alone = last - first == 1 and chunk_count(tensor) == 1
    found: list[Extent] = []
    per_run = -(-tensor.run_bytes // tensor.chunk_bytes)
    position = 0
    for index in range(first, last):
        run, within = divmod(index, per_run)
        begin = within * tensor.chunk_bytes
        nbytes = min(tensor.chunk_bytes, tensor.run_bytes - begin)
        decoded = tensor.chunk_bytes if tensor.padded else nbytes
        segments = (Segment(piece, run * tensor.run_bytes + begin, lead, nbytes),)
        if encoded:
            item = PLANE_BYTES[tensor.spec.dtype]
            found.append(
                Extent(shard, position, FRAME_HEADER_BYTES + decoded, b"", segments, item, FRAME_HEADER_BYTES + decoded)
            )
            position += 1
        else:
            room = decoded if alone else padded(decoded)
            found.append(Extent(shard, position, room, b"", segments, 0, decoded))
            position += room
    return found


def frame_bound(extent: Extent) -> int:
    """Return the most bytes that an encoded extent can take in its file."""
    return padded(extent.payload_bytes + FRAME_OVERHEAD_BYTES)


def content_key(shard: ShardFile, codec: Codec) -> str:
    """Digest everything but the tensors' bytes that decides the content of a shard that is packed on write: where the
    plans and the chunks of two shards are equal, their files are."""
    parts = [
        (run.tensor.spec.name, run.tensor.spec.dtype, run.tensor.spec.shape, run.tensor.chunk_bytes, run.count)
        for run in shard.runs
    ]
    text = repr((shard.file, codec.name, sorted(codec.to_dict().items()), parts))
    return xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()


def _block(shape: Sequence[int], item: int, limit: int) -> tuple[int, tuple[int, ...]]:
    """Return the axis that the largest contiguous block of at most ``limit`` bytes cuts (0 where it cuts none), and the
    shape of that block. ``item`` is the size of an element in bytes."""
    block = [max(1, size) for size in shape]
    inner = item
    for axis in reversed(range(len(block))):
        if inner * block[axis] > limit:
            most = max(1, limit // inner)
            pieces = -(-block[axis] // most)
            block[axis] = -(-block[axis] // pieces)
            block[:axis] = [1] * axis
            return axis, tuple(block)
        inner *= block[axis]
    return 0, tuple(block)


def _coordinates(number: int, counts: Sequence[int]) -> tuple[int, ...]:
    found: list[int] = []
    for count in reversed(counts):
        number, index = divmod(number, count)
        found.append(index)
    return tuple(reversed(found))
