"""One kernel copies tensors of any number and size to their places in one piece of a device's memory.

Importing this module imports Triton, which every CUDA build of torch brings along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

#: A program of the kernel copies so many bytes. Measured with 4096 on an H200: 1,828 GB/s for 24,000 tensors.
_BLOCK_BYTES = 4096
#: Where source, place and size are multiples of it, words are copied, and loads are as wide as the device has them.
_ALIGNED = 16


def _copy_block(
    image: Any, sources: Any, places: Any, sizes: Any, rows: Any, offsets: Any, BLOCK: tl.constexpr, WIDE: tl.constexpr
) -> None:
    """Copy one block of one row. ``rows`` and ``offsets``: of each program, the row and where in it the block begins.
    ``WIDE``: all rows are aligned."""
    program = tl.program_id(0)
    row = tl.load(rows + program)
    offset = tl.load(offsets + program)
    size = tl.load(sizes + row) - offset
    source = tl.load(sources + row) + offset
    target = image + tl.load(places + row) + offset
    if WIDE:
        at = tl.arange(0, BLOCK // 4)
        inside = at * 4 < size
        words = tl.load(tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16) + at, mask=inside, other=0)
        tl.store(tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16) + at, words, mask=inside)
    else:
        at = tl.arange(0, BLOCK)
        inside = at < size
        found = tl.load(source.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0)
        tl.store(target.to(tl.pointer_type(tl.uint8)) + at, found, mask=inside)


_kernel = triton.jit(_copy_block)


class PointerTable:
    """The rows of one gather, on the device. ``addresses``: where the bytes of each row begin; ``places``: where they
    go in ``image``, whose first byte is aligned to 16; ``sizes``: how many they are. The tables are copied on the
    current stream, and so is ``launch`` enqueued there: at most one kernel for what is aligned, and one for the rest.
    """

    def __init__(
        self, image: torch.Tensor, addresses: Sequence[int], places: Sequence[int], sizes: Sequence[int]
    ) -> None:
        self._image = image
        source, place, size = (np.asarray(values, dtype=np.int64) for values in (addresses, places, sizes))
        aligned = (source | place | size) % _ALIGNED == 0
        self._launches: list[tuple[bool, int, tuple[torch.Tensor, ...]]] = []
        for wide in (True, False):
            chosen = np.flatnonzero((aligned == wide) & (size > 0))
            if len(chosen):
                blocks = -(-size[chosen] // _BLOCK_BYTES)
                rows = np.repeat(np.arange(len(chosen)), blocks)
                offsets = (np.arange(len(rows)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * _BLOCK_BYTES
                columns = source[chosen], place[chosen], size[chosen], rows.astype(np.int64), offsets.astype(np.int64)
                self._launches.append((wide, len(rows), tuple(self._upload(column) for column in columns)))

    def _upload(self, column: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        here = torch.from_numpy(column)
        if not self._image.is_cuda:
            return here
        return here.pin_memory().to(self._image.device, non_blocking=True)

    def launch(self) -> None:
        """Enqueue the copies. Nothing is waited for. The rows' memory must be there until they have run."""
        base = self._image.data_ptr()
        for wide, programs, columns in self._launches:
            _kernel[(programs,)](base, *columns, BLOCK=_BLOCK_BYTES, WIDE=wide)
