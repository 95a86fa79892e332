"""Where a tensor's bytes are cut for those who will read a part of it: one digest for each part, so that a rank that
needs some rows reads, and verifies, little more than those."""

from __future__ import annotations

import functools

from asyncckpt.types import TensorSpec

#: The numbers of ranks whose shares of the rows, as ``torch.chunk`` deals them out, are cut exactly.
READERS = (2, 3, 4, 6, 8)
#: Tensors below this are read whole: cutting them would only make manifests long.
MIN_CUT_BYTES = 1 << 20


def cuts(spec: TensorSpec) -> tuple[int, ...]:
    """Byte offsets in the tensor, ascending, both its ends among them: whoever needs its first rows needs nothing of
    what lies before it. Empty for a tensor that is read whole. Pure."""
    if spec.nbytes < MIN_CUT_BYTES or not spec.shape or spec.shape[0] < 2:
        return ()
    return _cuts(spec.shape[0], spec.nbytes // spec.shape[0])


@functools.lru_cache(maxsize=1 << 14)
def _cuts(rows: int, row_bytes: int) -> tuple[int, ...]:
    found: set[int] = set()
    for readers in READERS:
        found.update(range(0, rows, -(-rows // readers)))
    return tuple(row * row_bytes for row in sorted(found | {rows}))
