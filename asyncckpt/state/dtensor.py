"""Tensors that several ranks hold together → the rows that this rank holds, and who holds the others.

In a shard file a tensor is one contiguous byte range in row-major order, so rows (dim 0) are what a rank can write by
itself. A ``DTensor`` that is split otherwise is redistributed to rows by DTensor itself, which communicates.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from asyncckpt.errors import UnsupportedValue
from asyncckpt.types import Rows


@dataclass(frozen=True, slots=True)
class Local:
    """This rank's part of a global tensor: its row-major elements from ``first`` on. ``private``: a copy made for the
    snapshot."""

    tensor: torch.Tensor
    first: int
    rows: Rows
    private: bool


def is_distributed(value: Any) -> bool:
    """Whether ``value`` is a ``DTensor``. Costs nothing where nobody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded_tensor(value: Any) -> bool:
    """Whether ``value`` is a ``ShardedTensor``, what FSDP's first version gives without a device mesh."""
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    return module is not None and isinstance(value, module.ShardedTensor)


@dataclass(frozen=True, slots=True)
class _Place:
    """What this rank holds of tensors of one shape and placement: ``wanted`` are the placements to redistribute to
    first, if any. ``rows`` is None where the parts are not one run of rows each."""

    wanted: list[Any] | None
    rows: Rows | None
    first: int


#: Placements that are known by their identity; a state has as many as it has tensors, or fewer.
_MOST_PLACEMENTS = 1 << 16


class _Places:
    """By mesh object, which a process makes anew when it becomes another rank, then by placements and shape: a training
    state asks for the same at every save, on the training thread. Most tensors lie on the mesh asked for last, and a
    tensor's placements are the same object each time: hashing them calls Python for every dimension of the mesh."""

    def __init__(self) -> None:
        self._known: MutableMapping[Any, dict[Any, _Place]] = WeakIdKeyDictionary()
        self._latest: tuple[Callable[[], Any], dict[Any, _Place]] = (lambda: None, {})
        #: ``id`` → the placements, which that keeps alive, and the number of all that are equal to them.
        self._by_id: dict[int, tuple[Any, int]] = {}
        self._equal: dict[Any, int] = {}

    def of(self, value: Any, where: str) -> _Place:
        """Raises ``UnsupportedValue`` for a rank outside the tensor's mesh."""
        mesh = value.device_mesh
        latest, known = self._latest
        if latest() is not mesh:
            known = self._of_mesh(mesh, where)
        placements = value.placements
        held = self._by_id.get(id(placements))
        key = (self._remember(placements) if held is None else held[1]), value.shape
        place = known.get(key)
        if place is None:
            place = known[key] = _place(value)
        return place

    def _remember(self, placements: Any) -> int:
        """A number for placements that are equal."""
        if len(self._by_id) >= _MOST_PLACEMENTS:
            self._by_id.clear()
        number = self._equal.setdefault(placements, len(self._equal))
        self._by_id[id(placements)] = placements, number
        return number

    def _of_mesh(self, mesh: Any, where: str) -> dict[Any, _Place]:
        if mesh.get_coordinate() is None:
            raise UnsupportedValue(
                f"{where}: this rank is not part of the tensor's device mesh {mesh}; leave it out here"
            )
        known = self._known.setdefault(mesh, {})
        self._latest = weakref.ref(mesh), known
        return known


def _place(value: Any) -> _Place:
    wanted, shape = row_placements(value), tuple(value.shape)
    placements = tuple(value.placements if wanted is None else wanted)
    rows = _spread(value.device_mesh, placements, shape[0] if shape else 1)
    part = rows.part_of.get(torch.distributed.get_rank()) if rows is not None else None
    first = rows.bounds[part] * _width(shape) if rows is not None and part is not None else 0
    return _Place(wanted, rows, first)


_places = _Places()


def local_rows(value: Any, where: str) -> Local:
    """The rows of a ``DTensor`` that this rank holds.

    Communicates, on the calling thread and on all ranks of its mesh, where the tensor is split along another dimension
    than the first or is a pending sum. Raises ``UnsupportedValue`` for a rank outside the mesh.
    """
    place = _places.of(value, where)
    if place.rows is None:
        raise UnsupportedValue(f"{where}: its placements {value.placements} do not give each rank one run of rows")
    if place.wanted is not None:
        value = value.redistribute(placements=place.wanted)
    local = value.to_local()
    wait = getattr(local, "wait", None)  # a collective may still be on its way
    return Local(wait() if wait is not None else local, place.first, place.rows, private=place.wanted is not None)


@dataclass(frozen=True, slots=True)
class Receiver:
    """What takes the stored values of a ``DTensor``: this rank's rows from element ``first`` on, and, where those are
    not what the live tensor holds, ``finish``, which communicates."""

    tensor: torch.Tensor
    first: int
    finish: Callable[[], None] | None = None


@torch.no_grad()
def receiver(value: Any, where: str) -> Receiver:
    """Where the stored values of a live ``DTensor`` or ``ShardedTensor`` go on this rank; see ``local_rows``."""
    if is_sharded_tensor(value):
        local = sharded_tensor_rows(value, where)
        return Receiver(local.tensor, local.first)
    from torch.distributed.tensor import DTensor

    wanted = row_placements(value)
    if wanted is None:
        local = local_rows(value, where)
        return Receiver(local.tensor, local.first)
    mesh, shape = value.device_mesh, tuple(value.shape)
    rows = _spread(mesh, tuple(wanted), shape[0])
    part = rows.part_of.get(torch.distributed.get_rank()) if rows is not None else None
    begin, end = (rows.bounds[part], rows.bounds[part + 1]) if rows is not None and part is not None else (0, 0)
    mine = torch.empty((end - begin, *shape[1:]), dtype=value.dtype, device=value.to_local().device)

    def finish() -> None:
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(mine, mesh, wanted, run_check=False, shape=torch.Size(shape), stride=stride)
        with torch.no_grad():
            value.to_local().copy_(whole.redistribute(placements=value.placements).to_local())

    return Receiver(mine, begin * _width(shape), finish)


def like(parameter: Any, dtype: torch.dtype) -> Any:
    """A new ``DTensor`` of the same shape, mesh and placements."""
    from torch.distributed.tensor import DTensor

    local = torch.zeros_like(parameter.to_local(), dtype=dtype, requires_grad=False)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def row_placements(value: Any) -> list[Any] | None:
    """The placements that ``local_rows`` would redistribute to; None where it would not."""
    return _row_placements(value.device_mesh, tuple(value.placements), value.shape[0] if value.dim() else 1)


@functools.lru_cache(maxsize=1 << 12)
def _row_placements(mesh: Any, placements: tuple[Any, ...], rows: int) -> list[Any] | None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Split

    by_rows = all(isinstance(p, Replicate) or (_splits(p) and p.dim == 0) for p in placements)
    if by_rows and _spread(mesh, placements, rows) is not None:
        return None
    return [p if isinstance(p, Replicate) else Split(0) for p in placements]


def sharded_tensor_rows(value: Any, where: str) -> Local:
    """Likewise for a ``ShardedTensor``. Raises ``UnsupportedValue`` where this rank has several parts, or its parts are
    not whole rows."""
    parts = sorted(value.metadata().shards_metadata, key=lambda part: tuple(part.shard_offsets))
    shape = tuple(value.metadata().size)
    if len(value.local_shards()) > 1 or any(tuple(p.shard_sizes[1:]) != shape[1:] for p in parts):
        raise UnsupportedValue(f"{where}: only a ShardedTensor of whole rows, one part a rank, is stored; use FSDP2")
    spans = [(p.shard_offsets[0], p.shard_sizes[0], (p.placement.rank(),)) for p in parts if p.shard_sizes[0]]
    rows = Rows((*(begin for begin, _, _ in spans), shape[0]), tuple(holders for _, _, holders in spans))
    mine = value.local_shards()
    if not mine:
        return Local(torch.empty((0, *shape[1:]), dtype=value.dtype), 0, rows, private=True)
    return Local(mine[0].tensor, mine[0].metadata.shard_offsets[0] * _width(shape), rows, private=False)


def _splits(placement: Any) -> bool:
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, Split | _StridedShard)


def _width(shape: tuple[int, ...]) -> int:
    """Elements of a row."""
    count = 1
    for size in shape[1:]:
        count *= size
    return count


@functools.lru_cache(maxsize=1 << 12)
def _spread(mesh: Any, placements: tuple[Any, ...], rows: int) -> Rows | None:
    """Who holds which rows; the same on every rank. Cached, so that equal tensors share one object. None where the
    parts of an uneven strided split are not one run of rows each."""
    holders: dict[tuple[int, int], list[int]] = {}
    for coordinate in itertools.product(*(range(size) for size in mesh.mesh.shape)):
        begin, count = _part((rows,), mesh, coordinate, placements)
        if count:
            holders.setdefault((begin, begin + count), []).append(int(mesh.mesh[coordinate]))
    spans = sorted(holders)
    bounds = (*(begin for begin, _ in spans), rows)
    if any(span != (begin, end) for span, begin, end in zip(spans, bounds, bounds[1:], strict=False)):
        return None
    return Rows(bounds, tuple(tuple(sorted(holders[span])) for span in spans))


def _part(shape: tuple[int, ...], mesh: Any, coordinate: Any, placements: Any) -> tuple[int, int]:
    """``(first row, rows)`` of the part at a coordinate of the mesh."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    sizes, offsets = _compute_local_shape_and_global_offset(
        (shape[0],), tuple(mesh.mesh.shape), list(coordinate), placements
    )
    return int(offsets[0]), int(sizes[0])


#: The job of the process that this one was forked from, where there was one: a child is no rank of it.
_inherited: list[object] = []


def _leave_job() -> None:
    _inherited[:] = [torch.distributed.group.WORLD] if _initialized() else []


os.register_at_fork(after_in_child=_leave_job)


def _initialized() -> bool:
    available: Callable[[], bool] = torch.distributed.is_available
    return available() and torch.distributed.is_initialized()


def job_size() -> int:
    """Ranks of this process's job; 1 where ``torch.distributed`` is not initialised, and in a rank's forked child."""
    if not _initialized() or torch.distributed.group.WORLD in _inherited:
        return 1
    return torch.distributed.get_world_size()
