"""Page-aligned memory for O_DIRECT, and the one rounding to its block size."""

from __future__ import annotations

import contextlib
import mmap

from asyncckpt.types import ALIGNMENT_BYTES


def aligned_buffer(nbytes: int) -> mmap.mmap:
    """Page-aligned memory for O_DIRECT, a multiple of 4096 bytes."""
    size = max(1, -(-nbytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= 2 << 20:
        _in_huge_pages(buffer)
    return buffer


def _in_huge_pages(memory: mmap.mmap) -> None:
    with contextlib.suppress(OSError):  # EINVAL of a kernel built without them: they are speed, not memory
        memory.madvise(mmap.MADV_HUGEPAGE)


def padded(nbytes: int) -> int:
    """Up to the next multiple of 4096."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
