"""Tensors, components and files that a manifest only points at: the parts that ranks wrote beside it describe them.

Each of these looks like the record it stands for, and reads a part when something is asked of it that only the part
says. So whoever needs what one rank has written reads that rank's part, and no other.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncckpt.errors import ManifestInvalid
from asyncckpt.manifest.records import (
    BoxedRecord,
    BoxRecord,
    ComponentRecord,
    ExtentRecord,
    FileRecord,
    StoredTensor,
    TensorRecord,
)
from asyncckpt.types import JsonValue


@dataclass(frozen=True, slots=True)
class Spread:
    """``Spread`` says how the rows of a tensor are spread over the parts of a manifest: each rank of ``holders[i]`` may
    have written rows among ``[bounds[i], bounds[i + 1])``, and together they have written all of them. A tensor without
    dimensions counts as one row."""

    bounds: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]


class PartSource(Protocol):
    """Gives what the parts of a manifest say. Thread-safe; blocks on the storage, and raises ``CheckpointDamaged``."""

    where: str
    spreads: Sequence[Spread]

    @property
    def ranks(self) -> int:
        """The number of parts."""

    def boxes(self, rank: int, component: str, tensor: str, dtype: str) -> Sequence[BoxRecord]:
        """Return the boxes of a tensor that a rank has written."""

    def files_of(self, ranks: Iterable[int] | None, component: str) -> tuple[str, ...]:
        """Return the names of the files that these ranks, or all, have written of a component. Reads nothing."""

    def component_bytes(self, component: str) -> int:
        """Return the size of all files that ranks have written of a component. Reads nothing."""

    def extents(self, rank: int, file: str) -> tuple[ExtentRecord, ...]:
        """Return the extents of a file that a rank has written."""

    def component(self, rank: int, name: str) -> ComponentRecord:
        """Return a component that a rank has of its own."""

    def values(self, rank: int, name: str) -> JsonValue:
        """Return the plain values of such a component."""


def _set(record: object, **fields: object) -> None:
    """Set fields of a record, which nobody else can."""
    for name, value in fields.items():
        object.__setattr__(record, name, value)


class SpreadRecord(BoxedRecord):
    """``SpreadRecord`` is a stored tensor whose boxes are listed by the parts of several ranks. ``spread``: the number
    of its ``Spread``. ``copies``: the first and the last of each part's holders that wrote of it, None for all.
    Compared by identity."""

    __slots__ = ("_component", "_copies", "_name", "_parts", "_spread")

    _component: str
    _copies: tuple[int, int] | None
    _name: str
    _parts: PartSource
    _spread: int

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        nbytes: int,
        parts: PartSource,
        component: str,
        name: str,
        spread: int,
        copies: tuple[int, int] | None,
    ) -> None:
        _set(self, dtype=dtype, shape=shape, nbytes=nbytes)
        _set(self, _parts=parts, _component=component, _name=name, _copies=copies, _spread=spread)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"SpreadRecord({self._component}.{self._name}, {self.dtype}, {self.shape})"

    @property
    def spread(self) -> int:
        """The number of the tensor's ``Spread`` in its manifest."""
        return self._spread

    @property
    def rows(self) -> int:
        """The number of rows that are spread."""
        return self.shape[0] if self.shape else 1

    @property
    def boxes(self) -> tuple[BoxRecord, ...]:
        """All boxes of the tensor. Reads the parts of all ranks that hold any."""
        return self.boxes_in(0, self.rows)

    def boxes_in(self, begin: int, end: int) -> tuple[BoxRecord, ...]:
        """Return the boxes that hold the rows ``[begin, end)``, and maybe others. Reads the parts of the ranks that
        wrote them. Raises ``ManifestInvalid`` where these do not tile the rows."""
        (found,) = boxes_in_each([(self, begin, end)])
        return found

    def sections(self, begin: int, end: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield where each stretch of the spread that shares rows with ``[begin, end)`` begins and ends, and which
        ranks may have written it. Reads nothing."""
        spread = self._parts.spreads[self._spread]
        first = max(0, bisect.bisect_right(spread.bounds, begin) - 1)
        for number in range(first, len(spread.holders)):
            low, high = spread.bounds[number : number + 2]
            if low >= end:
                break
            if self.nbytes and low < high:
                yield low, high, self._writers(number)

    def listed(self, boxes: Sequence[BoxRecord]) -> TensorRecord | BoxedRecord:
        """Return the record that a manifest without parts has of the tensor, all of whose boxes these are. Reads a part
        for a tensor without bytes."""
        if not self.nbytes:
            boxes = self._parts.boxes(0, self._component, self._name, self.dtype)
        if len(boxes) == 1 and boxes[0].shape == self.shape:  # a whole tensor is no box in its file's header
            (box,) = boxes
            return TensorRecord(self.dtype, self.shape, box.file, box.begin, box.end)
        return BoxedRecord(self.dtype, self.shape, self.nbytes, tuple(boxes))

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that the ranks which hold the tensor have written of its component. Reads nothing."""
        count = len(self._parts.spreads[self._spread].holders)
        ranks = dict.fromkeys(rank for number in range(count) for rank in self._writers(number))
        return self._parts.files_of(ranks, self._component)

    def files_of_component(self) -> tuple[str, ...]:
        """Return the names of the files that all ranks have written of the tensor's component. Reads nothing."""
        return self._parts.files_of(None, self._component)

    def _writers(self, number: int) -> tuple[int, ...]:
        holders = self._parts.spreads[self._spread].holders[number]
        return holders if self._copies is None else holders[self._copies[0] : self._copies[1] + 1]

    def of_rank(self, rank: int) -> Sequence[BoxRecord]:
        """Return the boxes of the tensor that a rank has written. Reads its part."""
        return self._parts.boxes(rank, self._component, self._name, self.dtype)

    def tiled(self, low: int, high: int, ranks: Iterable[int], found: list[BoxRecord]) -> list[BoxRecord]:
        """Return the boxes that these ranks have written, in order. They have to be whole rows from ``low`` to ``high``
        without gap or overlap: raises ``ManifestInvalid``."""
        found.sort(key=lambda box: box.offsets[:1])
        position = low
        for box in found:
            rest = all(offset == 0 for offset in box.offsets[1:]) and box.shape[1:] == self.shape[1:]
            if not rest or len(box.shape) != len(self.shape) or (box.offsets[0] if box.offsets else 0) != position:
                position = -1
                break
            position += box.shape[0] if box.shape else 1
        if position != high:
            raise ManifestInvalid(
                f"{self._parts.where}: the parts of ranks {sorted(ranks)} do not list the rows {low} to {high} of "
                f"{self._component}.{self._name:.80}, each once"
            )
        return found


def boxes_in_each(wanted: Sequence[tuple[SpreadRecord, int, int]]) -> list[tuple[BoxRecord, ...]]:
    """Return what ``boxes_in`` does of each tensor and the rows ``[begin, end)`` that are wanted of it. Each part is
    read once: one tensor after the other would read the parts of many ranks again and again."""
    sections = [list(record.sections(begin, end)) for record, begin, end in wanted]
    found: list[list[list[BoxRecord]]] = [[[] for _ in mine] for mine in sections]
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for number, mine in enumerate(sections):
        for at, (_, _, ranks) in enumerate(mine):
            for rank in ranks:
                by_rank.setdefault(rank, []).append((number, at))
    for rank in sorted(by_rank):
        for number, at in by_rank[rank]:
            found[number][at] += wanted[number][0].of_rank(rank)
    return [
        tuple(
            box
            for (low, high, ranks), boxes in zip(sections[number], found[number], strict=True)
            for box in record.tiled(low, high, ranks, boxes)
        )
        for number, (record, _, _) in enumerate(wanted)
    ]


class OwnComponent(ComponentRecord):
    """``OwnComponent`` is a component that one ``rank`` has of its own, which that rank's part describes. Where the
    root lists no file of it there are no tensors, and the part is read for its plain values alone. Compared by
    identity."""

    __slots__ = ("_name", "_parts", "_rank")

    _name: str
    _parts: PartSource
    _rank: int

    def __init__(self, kind: str, parts: PartSource, rank: int, name: str) -> None:
        _set(self, kind=kind, _parts=parts, _rank=rank, _name=name)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"OwnComponent({self._name}, {self.kind}, rank {self._rank})"

    def described(self) -> ComponentRecord:
        """Return the record that a manifest without parts has of the component. Reads the rank's part, where the
        component has tensors."""
        return self._parts.component(self._rank, self._name) if self.files else ComponentRecord(self.kind, {}, {})

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The stored tensors, by name."""
        return self.described().tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        """The other names of tied tensors."""
        return self.described().aliases

    @property
    def type_name(self) -> str:
        """The qualified name of the live object's class."""
        return self._parts.component(self._rank, self._name).type_name

    @property
    def strides(self) -> Mapping[str, tuple[int, ...]]:
        """The strides of tensors that were not row-major in memory."""
        return self.described().strides

    @property
    def rank(self) -> int:
        """The rank that has the component."""
        return self._rank

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that the rank has written of it. Reads nothing."""
        return self._parts.files_of((self._rank,), self._name)

    def values(self) -> JsonValue:
        """Return the component's plain values."""
        return self._parts.values(self._rank, self._name)


class SpreadFile(FileRecord):
    """``SpreadFile`` is a file that one ``rank`` has written, whose extents that rank's part lists. Compared by
    identity."""

    __slots__ = ("_parts", "rank")

    _parts: PartSource
    rank: int

    def __init__(self, name: str, nbytes: int, parts: PartSource, rank: int) -> None:
        _set(self, name=name, nbytes=nbytes, content_key="", bases=(), order=(), _parts=parts, rank=rank)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"SpreadFile({self.name}, {self.nbytes} bytes, rank {self.rank})"

    @property
    def extents(self) -> tuple[ExtentRecord, ...]:
        """The extents, which cover the file."""
        return self._parts.extents(self.rank, self.name)
