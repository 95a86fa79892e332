"""A tensor of a foreign format is read here piece by piece: nothing of it is in memory but the piece that is wanted."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.convert.source_file import SourceFile
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.memory.tensor_bytes import _copy_strided
from asyncckpt.state.dtypes import CODES, DTYPES

Array: TypeAlias = "np.ndarray[Any, Any]"


class SourceTensor(abc.ABC):
    """A tensor of a source: its ``dtype`` (a safetensors code), its ``shape``, and its row-major bytes, of which
    ``read_into`` gives any range. Two names that share one such object are tied."""

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self.dtype = dtype
        self.shape = tuple(shape)
        count = 1
        for size in self.shape:
            count *= size
        self.count = count
        self.nbytes = count * ITEM_BYTES[dtype]

    @abc.abstractmethod
    def read_into(self, begin: int, target: memoryview) -> None:
        """Fill ``target`` with the tensor's row-major bytes from ``begin`` on. Thread-safe. Blocks. Raises
        ``CheckpointDamaged`` where the source has fewer, and ``OSError``."""

    def whole(self) -> torch.Tensor:
        """Return the whole tensor in memory of its own; for small ones."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(0, data.numpy().data)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)


class FileTensor(SourceTensor):
    """A tensor whose row-major bytes lie in an open file from ``offset`` on. The file stays open as long as its
    source."""

    def __init__(self, dtype: str, shape: Sequence[int], file: SourceFile, offset: int, where: str) -> None:
        super().__init__(dtype, shape)
        self._file = file
        file.expected = True
        self._offset = offset
        self._where = where

    def read_into(self, begin: int, target: memoryview) -> None:
        if self._file.read_into(self._offset + begin, target) < len(target):
            raise CheckpointDamaged(f"{self._where}: the file ends within a tensor")


class ViewTensor(SourceTensor):
    """A tensor whose row-major elements are those of ``view``, a view of a mapped file with any strides. ``shape`` may
    divide the same elements otherwise."""

    def __init__(self, view: torch.Tensor, shape: Sequence[int] | None = None) -> None:
        super().__init__(CODES[view.dtype], tuple(view.shape) if shape is None else shape)
        self._view = view

    def read_into(self, begin: int, target: memoryview) -> None:
        if not len(target):
            return
        item = self._view.element_size()
        first, last = begin // item, -(-(begin + len(target)) // item)
        flat = torch.empty(last - first, dtype=self._view.dtype)
        _copy_strided(self._view, first, last, flat)
        skipped = begin - first * item
        target[:] = flat.view(torch.uint8).numpy().data[skipped : skipped + len(target)]


class PartsTensor(SourceTensor):
    """A tensor whose bytes are those of parts of others, one after the other: ``(tensor, first byte, bytes)``."""

    def __init__(
        self, dtype: str, shape: Sequence[int], parts: Sequence[tuple[SourceTensor, int, int]], where: str
    ) -> None:
        super().__init__(dtype, shape)
        self._parts = parts
        if sum(nbytes for _, _, nbytes in parts) < self.nbytes:
            raise CheckpointDamaged(f"{where}: its parts have fewer bytes than it has")

    def read_into(self, begin: int, target: memoryview) -> None:
        done = 0
        for tensor, first, nbytes in self._parts:
            if done < len(target) and begin < nbytes:
                count = min(nbytes - begin, len(target) - done)
                tensor.read_into(first + begin, target[done : done + count])
                done += count
            begin = max(0, begin - nbytes)


class RowsTensor(SourceTensor):
    """A tensor that is made row by row: ``row(n)`` returns the values of row ``n`` of its first dimension as an array,
    which may be decoded, or be another row of the source. The calls are thread-safe."""

    def __init__(self, dtype: str, shape: Sequence[int], row: Callable[[int], Array]) -> None:
        super().__init__(dtype, shape)
        self._row = row
        self._row_bytes = self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def read_into(self, begin: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            number, within = divmod(begin + done, self._row_bytes)
            data = np.ascontiguousarray(self._row(number)).reshape(-1).view(np.uint8).data
            part = data[within : within + len(target) - done]
            if not len(part):
                raise CheckpointDamaged(f"a row of {len(data)} bytes, which should have {self._row_bytes}")
            target[done : done + len(part)] = part
            done += len(part)


class LoadedTensor(SourceTensor):
    """A tensor that its library only gives as a whole. It is held while pieces of it are read, one tensor of a source
    at a time: ``holder`` is shared by all tensors of a source."""

    def __init__(self, dtype: str, shape: Sequence[int], load: Callable[[], Array], holder: Holder) -> None:
        super().__init__(dtype, shape)
        self._load = load
        self._holder = holder

    def read_into(self, begin: int, target: memoryview) -> None:
        data = self._holder.bytes_of(self, self._load)
        if begin + len(target) > len(data):
            raise CheckpointDamaged(f"a tensor of {len(data)} bytes, which should have {self.nbytes}")
        target[:] = data[begin : begin + len(target)]


class SlabsTensor(SourceTensor):
    """A tensor that its library gives in slabs of ``rows`` of its first dimension: ``load(first, last)`` returns those
    rows as an array. ``holder``: see ``LoadedTensor``; it holds one slab."""

    def __init__(
        self, dtype: str, shape: Sequence[int], rows: int, load: Callable[[int, int], Array], holder: Holder
    ) -> None:
        super().__init__(dtype, shape)
        self._rows = max(1, rows)
        self._load = load
        self._holder = holder
        count = self.shape[0] if self.shape else 1
        self._slab_bytes = self.nbytes // count * self._rows if count else 1

    def read_into(self, begin: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            number, within = divmod(begin + done, self._slab_bytes)
            first = number * self._rows
            data = self._holder.bytes_of((id(self), number), functools.partial(self._load, first, first + self._rows))
            part = data[within : within + len(target) - done]
            if not len(part):
                raise CheckpointDamaged(f"a slab of {len(data)} bytes, which should have {self._slab_bytes}")
            target[done : done + len(part)] = part
            done += len(part)


class Holder:
    """Holds the bytes of the tensor, or of the slab, that was asked for last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: object = None
        self._data = memoryview(b"")

    def bytes_of(self, owner: object, load: Callable[[], Array]) -> memoryview:
        with self._lock:
            if self._of != owner:
                self._data, self._of = memoryview(b""), None
                self._data = np.ascontiguousarray(load()).reshape(-1).view(np.uint8).data
                self._of = owner
            return self._data
