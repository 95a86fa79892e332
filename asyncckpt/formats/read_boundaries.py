"""A tensor's bytes are cut where readers of its parts are likely to begin. Each part has a digest of its own, so that a
rank that needs some rows reads, and verifies, little more than those."""

from __future__ import annotations

import functools

from asyncckpt.types import TensorSpec

#: The cuts suit jobs of so many ranks, each of which reads the rows that ``torch.chunk`` gives it.
READERS = (2, 3, 4, 6, 8)
#: A smaller tensor is read whole: cuts would only make manifests long.
MIN_CUT_BYTES = 1 << 20
#: What one rank has written of a tensor is read by another number of ranks in pieces that begin anywhere. It is cut
#: into so many runs of whole rows, but into none that have less than this much.
_RUNS = 16
RUN_BYTES = 64 << 10


def boundaries(spec: TensorSpec) -> tuple[int, ...]:
    """Return the offsets, in bytes and ascending, at which the tensor is cut, its beginning and end included: whoever
    reads its first rows needs nothing of what lies before it. Empty for a tensor that is read whole. Pure."""
    if spec.nbytes < MIN_CUT_BYTES or not spec.shape or spec.shape[0] < 2:
        return ()
    return _boundaries(spec.shape[0], spec.nbytes // spec.shape[0])


def part_boundaries(rows: int, first: int, count: int, row_bytes: int) -> tuple[int, ...]:
    """Return the offsets at which a rank's part of a tensor is cut, in bytes of the part and ascending, its beginning
    and end included: the tensor has so many ``rows`` of ``row_bytes``, and the part the ``count`` from row ``first``
    on. Empty for a part that is read together with what lies beside it. Pure."""
    if count * row_bytes < RUN_BYTES:
        return ()
    found = set(_runs(count, row_bytes))
    if count * row_bytes >= MIN_CUT_BYTES:
        found.update(_boundaries(count, row_bytes))
        begin, end = first * row_bytes, (first + count) * row_bytes
        found.update(at - begin for at in _boundaries(rows, row_bytes) if begin < at < end)
    return tuple(sorted(found))


def part_rows(nbytes: int) -> int:
    """Return into about how many runs ``part_boundaries`` cuts a part of so many bytes."""
    return _RUNS + len(READERS) if nbytes >= MIN_CUT_BYTES else 1 + nbytes // RUN_BYTES


@functools.lru_cache(maxsize=1 << 14)
def _runs(rows: int, row_bytes: int) -> tuple[int, ...]:
    each = max(1, rows // _RUNS, RUN_BYTES // row_bytes)
    return (*(row * row_bytes for row in range(0, rows, each)), rows * row_bytes)


@functools.lru_cache(maxsize=1 << 14)
def _boundaries(rows: int, row_bytes: int) -> tuple[int, ...]:
    found: set[int] = set()
    for readers in READERS:
        found.update(range(0, rows, -(-rows // readers)))
    return tuple(row * row_bytes for row in sorted(found | {rows}))
