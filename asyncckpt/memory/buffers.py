"""O_DIRECT needs page-aligned memory and sizes in whole blocks: this module allocates the one and rounds the other."""

from __future__ import annotations

import contextlib
import mmap

from asyncckpt.types import ALIGNMENT_BYTES


def aligned_buffer(nbytes: int) -> mmap.mmap:
    """Return page-aligned, zeroed memory of at least ``nbytes`` bytes, rounded up to a multiple of 4096 (at least one
    block)."""
    size = max(1, -(-nbytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= 2 << 20:
        _in_huge_pages(buffer)
    return buffer


def _in_huge_pages(memory: mmap.mmap) -> None:
    with contextlib.suppress(OSError):  # a kernel built without huge pages says EINVAL: they only make it faster
        memory.madvise(mmap.MADV_HUGEPAGE)


def padded(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to a multiple of 4096."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
