"""A tensor's bytes are cut where readers of its parts are likely to begin. Each part has a digest of its own, so that a
rank that needs some rows reads, and verifies, little more than those."""

from __future__ import annotations

import functools

from asyncckpt.types import TensorSpec

#: The cuts suit jobs of so many ranks, each of which reads the rows that ``torch.chunk`` gives it.
READERS = (2, 3, 4, 6, 8)
#: A smaller tensor is read whole: cuts would only make manifests long.
MIN_CUT_BYTES = 1 << 20


def boundaries(spec: TensorSpec) -> tuple[int, ...]:
    """Return the offsets, in bytes and ascending, at which the tensor is cut, its beginning and end included: whoever
    reads its first rows needs nothing of what lies before it. Empty for a tensor that is read whole. Pure."""
    if spec.nbytes < MIN_CUT_BYTES or not spec.shape or spec.shape[0] < 2:
        return ()
    return _boundaries(spec.shape[0], spec.nbytes // spec.shape[0])


@functools.lru_cache(maxsize=1 << 14)
def _boundaries(rows: int, row_bytes: int) -> tuple[int, ...]:
    found: set[int] = set()
    for readers in READERS:
        found.update(range(0, rows, -(-rows // readers)))
    return tuple(row * row_bytes for row in sorted(found | {rows}))
