"""Live tensors that take whole stored ones, byte for byte, are filled an extent at a time, however many lie in it.

They are a table: where each begins and ends in its file, and its address in memory. Which of them an extent holds is
two searches, and copying them is one call for all. Whatever needs more than that (another dtype, a part, a device,
gaps) goes the way that ``fill`` has for it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from asyncckpt.codecs.dtypes import NAMES
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.manifest.records import ExtentRecord, StoredTensor, TensorRecord
from asyncckpt.memory.tensor_bytes import copy_memory, copy_small
from asyncckpt.read.boxes import Target
from asyncckpt.read.scatter import Window

#: Larger copies are made without the interpreter's lock; to give it away and take it back costs more than a small one.
_SMALL_BYTES: Final = 1 << 16

_Numbers = npt.NDArray[np.int64]


class WholeTensors:
    """``WholeTensors`` collects such tensors by ``take``, and ``close`` makes tables of them. From then on it is
    thread-safe for extents that do not overlap. Whoever uses it keeps the tensors alive."""

    def __init__(self) -> None:
        there = loaded_torch()
        self._dtypes: dict[str, Any] = {code: getattr(there, name) for code, name in NAMES.items()}
        self._taken: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
        self._tables: dict[str, _Numbers] = {}

    def take(self, number: int, record: StoredTensor, targets: Sequence[Target]) -> bool:
        """Take the target of the stored tensor with this number if it is of the simple kind; return whether it is. What
        has no bytes is taken, too, and needs nothing."""
        if type(record) is not TensorRecord or len(targets) != 1 or type(targets[0]) is not Window:
            return False
        window = targets[0]
        tensor, begin, end = window.tensor, record.begin, record.end
        if (
            window.first
            or not tensor.is_cpu
            or tensor.dtype is not self._dtypes[record.dtype]
            or tensor.nbytes != end - begin
            or not tensor.is_contiguous()
            or tensor.is_neg()
            or tensor.is_conj()
        ):
            return False
        if begin < end:
            self._taken[record.file].append((begin, end, tensor.data_ptr(), number))
        return True

    def close(self) -> Iterator[tuple[str, int, list[tuple[int, int]]]]:
        """Yield, for each file, its name, how many stored tensors are wanted of it, and in which byte ranges they lie:
        neighbours are one range."""
        for file, rows in self._taken.items():
            table = np.array(rows, dtype=np.uint64).astype(np.int64).T  # addresses fit: user memory is the lower half
            table = table[:, np.lexsort((table[1], table[0]))]
            self._tables[file] = table
            begins, ends = table[0], np.maximum.accumulate(table[1])
            firsts = np.flatnonzero(np.concatenate(([True], begins[1:] > ends[:-1])))
            lasts = np.concatenate((firsts[1:], [len(begins)])) - 1
            stored = int(np.count_nonzero(begins[1:] != begins[:-1])) + 1
            yield file, stored, list(zip(begins[firsts].tolist(), ends[lasts].tolist(), strict=True))
        self._taken.clear()

    def copy_in(self, file: str, extent: ExtentRecord, view: memoryview, begun: Callable[[list[int]], None]) -> None:
        """Copy from a file's verified extent, whose bytes ``view`` has, to every tensor that has bytes in it. ``begun``
        is called with the numbers of these first."""
        table = self._tables.get(file)
        if table is None:
            return
        low, high = extent.offset, extent.offset + extent.nbytes
        # stored tensors do not overlap, so their ends rise as their beginnings do
        found = slice(np.searchsorted(table[1], low, "right"), np.searchsorted(table[0], high, "left"))
        begins, ends, addresses, numbers = table[:, found]
        if not len(begins):
            return
        begun(numbers.tolist())
        first, last = np.maximum(begins, low), np.minimum(ends, high)
        source = int(np.frombuffer(view, np.uint8).ctypes.data) - low
        into, out_of, sizes = addresses + (first - begins), source + first, last - first
        small = sizes <= _SMALL_BYTES
        # ``map`` into an empty deque runs no line of Python a tensor
        deque(map(copy_small, into[small].tolist(), out_of[small].tolist(), sizes[small].tolist()), maxlen=0)
        deque(map(copy_memory, into[~small].tolist(), out_of[~small].tolist(), sizes[~small].tolist()), maxlen=0)
