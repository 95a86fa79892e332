"""A component's tensors are a table: their names once, and a column for each field, checked a whole column at a time.

A manifest may list a hundred thousand tensors. To check and keep them row by row takes most of the time of a restore,
so rows of whole tensors are checked as columns, and the record of a tensor is made when somebody asks for it. What the
columns do not clearly pass is left to ``parse``, which looks at each row and says what is wrong with it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar, overload

import numpy as np
import numpy.typing as npt

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.manifest.records import ComponentRecord, FileRecord, StoredTensor, TensorRecord
from asyncckpt.manifest.spread import OwnComponent, SpreadRecord

Numbers = npt.NDArray[np.int64]
#: Products of numbers up to this one and the size of an element still fit into 64 bits.
_MOST_ELEMENTS: Final = 1 << 57
_MOST_BYTES: Final = int(np.iinfo(np.int64).max)
_MOST_DIMENSIONS: Final = 64
_FIELDS: Final = 5
_T = TypeVar("_T")


class TensorTable(Mapping[str, StoredTensor]):
    """``TensorTable`` maps the names of stored tensors, each of which lies whole in a file, to their records, which it
    makes when they are asked for. The same name always gives the same object. The columns have one entry a tensor, in
    the order of the names: ``dtypes`` their safetensors codes, ``shapes``, ``files`` the names of their files,
    ``begins`` and ``ends`` the byte ranges there. Read-only and thread-safe."""

    __slots__ = ("_made", "_rows", "_spans", "begins", "dtypes", "ends", "files", "shapes")

    def __init__(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        files: Sequence[str],
        begins: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        self._rows = dict(zip(names, range(len(names)), strict=True))
        self._made: dict[str, TensorRecord] = {}
        self._spans = begins, ends
        self.dtypes = dtypes
        self.shapes = shapes
        self.files = files
        self.begins: Numbers = np.array(begins, dtype=np.int64)
        self.ends: Numbers = np.array(ends, dtype=np.int64)

    def __getitem__(self, name: str) -> TensorRecord:
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    @overload
    def get(self, name: str, default: None = None) -> TensorRecord | None: ...
    @overload
    def get(self, name: str, default: _T) -> TensorRecord | _T: ...
    def get(self, name: str, default: object = None) -> object:
        found = self._made.get(name)
        if found is not None:
            return found
        row = self._rows.get(name)
        if row is None:
            return default
        begins, ends = self._spans
        made = TensorRecord(self.dtypes[row], self.shapes[row], self.files[row], begins[row], ends[row])
        return self._made.setdefault(name, made)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def file_names(self) -> set[str]:
        """Return the names of the files that the tensors lie in."""
        return set(self.files)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return int((self.ends - self.begins).sum())

    def spans(self) -> Iterator[tuple[str, Numbers, Numbers]]:
        """Yield, for each file, its name and where the tensors in it that have any bytes begin and end."""
        names = sorted(set(self.files))
        code = {name: number for number, name in enumerate(names)}
        codes = np.fromiter(map(code.__getitem__, self.files), np.int64, len(self.files))
        solid = self.ends > self.begins
        for number, name in enumerate(names):
            mine = solid & (codes == number)
            if mine.any():
                yield name, self.begins[mine], self.ends[mine]


def files_with_tensors(component: ComponentRecord) -> set[str]:
    """Return the names of the files that a component's tensors lie in, whole or in part."""
    if isinstance(component, OwnComponent):
        return set(component.files)
    if isinstance(component.tensors, TensorTable):
        return component.tensors.file_names()
    found: set[str] = set()
    spread = False
    for tensor in component.tensors.values():
        if not isinstance(tensor, SpreadRecord):
            found.update(tensor.files)
        elif not spread:  # one says it for all of the component
            spread = True
            found.update(tensor.files_of_component())
    return found


def tensors_by_file(component: ComponentRecord) -> Counter[str]:
    """Count a component's tensors that have any bytes, by the names of the files that they lie in. Those that only
    parts of the manifest describe are left out."""
    if isinstance(component, OwnComponent):
        return Counter()
    if isinstance(component.tensors, TensorTable):
        return Counter({file: len(begins) for file, begins, _ in component.tensors.spans()})
    listed = [tensor for tensor in component.tensors.values() if not isinstance(tensor, SpreadRecord)]
    return Counter(file for tensor in listed if tensor.nbytes for file in tensor.files)


def table_of(rows: Mapping[str, Any], files: Mapping[str, FileRecord]) -> TensorTable | None:
    """Return the table of a component's rows, as JSON has them, or None where not every one of them clearly is that of
    a whole tensor that fits its file. Never raises: the rows may come from an attacker."""
    if set(map(type, rows.values())) != {list} or set(map(len, rows.values())) != {_FIELDS}:
        return None
    dtypes, shapes, names, begins, ends = zip(*rows.values(), strict=True)
    if set(map(type, dtypes)) | set(map(type, names)) != {str} or set(map(type, shapes)) != {list}:
        return None
    if not set(dtypes) <= ITEM_BYTES.keys() or not set(names) <= files.keys():
        return None
    if set(map(type, begins)) | set(map(type, ends)) != {int}:
        return None
    if not set(map(type, itertools.chain.from_iterable(shapes))) <= {int}:
        return None
    sizes = list(map(tuple, shapes))
    elements: dict[tuple[int, ...], int] = {}
    for shape in set(sizes):
        if len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0:
            return None
        elements[shape] = math.prod(shape)
        if max(shape, default=0) >= _MOST_ELEMENTS or elements[shape] >= _MOST_ELEMENTS:
            return None
    count = len(rows)
    try:
        begin, end = np.array(begins, dtype=np.int64), np.array(ends, dtype=np.int64)
    except OverflowError:
        return None
    item = np.fromiter(map(ITEM_BYTES.__getitem__, dtypes), np.int64, count)
    nbytes = item * np.fromiter(map(elements.__getitem__, sizes), np.int64, count)
    limits = {name: min(files[name].nbytes, _MOST_BYTES) for name in set(names)}
    limit = np.fromiter(map(limits.__getitem__, names), np.int64, count)
    fits = (begin >= 0) & (end <= limit) & (end >= begin) & (end - begin == nbytes) & (begin % item == 0)
    if not fits.all():
        return None
    shared = {shape: shape for shape in elements}  # equal shapes are one object
    return TensorTable(list(rows), dtypes, [shared[shape] for shape in sizes], names, begins, ends)


def overlap(spans: Sequence[tuple[Numbers, Numbers]]) -> bool:
    """Return whether two of the byte ranges, given as arrays of where they begin and end, share a byte. None of them is
    empty."""
    begins = np.concatenate([begin for begin, _ in spans])
    ends = np.concatenate([end for _, end in spans])
    order = np.lexsort((ends, begins))
    return bool((begins[order][1:] < ends[order][:-1]).any())
