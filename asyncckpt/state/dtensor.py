"""Several ranks can hold a tensor together: this module finds the rows that this rank holds, and who holds the others.

In a shard file a tensor is one contiguous byte range in row-major order, so rows (dimension 0) are what a rank can
write by itself. A ``DTensor`` that is split along another dimension is redistributed to rows by DTensor's own code,
which communicates.
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
from asyncckpt.types import RowOwners


@dataclass(frozen=True, slots=True)
class LocalRows:
    """``LocalRows`` is this rank's part of a global tensor. ``tensor`` holds the row-major elements of the global one
    from element ``first`` on; ``rows`` says which ranks hold which rows. ``private``: the tensor was made for the
    snapshot, so nobody else can change it. ``redistribute``: see ``LocalTensor``."""

    tensor: torch.Tensor
    first: int
    rows: RowOwners
    private: bool
    redistribute: Callable[[], torch.Tensor] | None = None


def is_distributed(value: Any) -> bool:
    """Return whether ``value`` is a ``DTensor``. DTensor's module is not imported for that: where nobody has imported
    it, nothing can be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded_tensor(value: Any) -> bool:
    """Return whether ``value`` is a ``ShardedTensor``, which FSDP's first version gives where it has no device mesh."""
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    return module is not None and isinstance(value, module.ShardedTensor)


@dataclass(frozen=True, slots=True)
class _RowPlacement:
    """``_RowPlacement`` says what this rank holds of every tensor of one shape, mesh and placements. ``wanted`` lists
    the placements that such a tensor must be redistributed to first, or is None. ``rows`` is None where some rank's
    part is not one run of rows. ``first`` is the row-major index of this rank's first element."""

    wanted: list[Any] | None
    rows: RowOwners | None
    first: int


#: So many placements are remembered by their identity; a state has at most one for each of its tensors.
_MOST_PLACEMENTS = 1 << 16


class _RowPlacements:
    """Remembers the ``_RowPlacement`` of every mesh, placements and shape, because a training state asks for the same
    ones at every save, on the training thread.

    Meshes are told apart by identity: a process makes new ones when it becomes another rank. Placements are looked up
    by identity first, because to hash them calls Python for every dimension of the mesh, and a tensor's placements are
    the same object at every save. Most tensors lie on the mesh that was asked for last.
    """

    def __init__(self) -> None:
        self._known: MutableMapping[Any, dict[Any, _RowPlacement]] = WeakIdKeyDictionary()
        self._latest: tuple[Callable[[], Any], dict[Any, _RowPlacement]] = (lambda: None, {})
        #: Maps ``id(placements)`` to the placements, which keeps them alive, and to the number of all equal ones.
        self._by_id: dict[int, tuple[Any, int]] = {}
        self._equal: dict[Any, int] = {}

    def of(self, value: Any, where: str) -> _RowPlacement:
        """Return the place of the ``DTensor`` ``value``. Raises ``UnsupportedValue``, which names ``where``, on a rank
        outside its mesh."""
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
        """Return the number that all placements equal to these have."""
        if len(self._by_id) >= _MOST_PLACEMENTS:
            self._by_id.clear()
        number = self._equal.setdefault(placements, len(self._equal))
        self._by_id[id(placements)] = placements, number
        return number

    def _of_mesh(self, mesh: Any, where: str) -> dict[Any, _RowPlacement]:
        if mesh.get_coordinate() is None:
            raise UnsupportedValue(
                f"{where}: this rank is not part of the tensor's device mesh {mesh}; leave it out here"
            )
        known = self._known.setdefault(mesh, {})
        self._latest = weakref.ref(mesh), known
        return known


def _place(value: Any) -> _RowPlacement:
    wanted, shape = row_placements(value), tuple(value.shape)
    placements = tuple(value.placements if wanted is None else wanted)
    rows = _spread(value.device_mesh, placements, shape[0] if shape else 1)
    part = rows.part_of_rank.get(torch.distributed.get_rank()) if rows is not None else None
    first = rows.bounds[part] * _width(shape) if rows is not None and part is not None else 0
    return _RowPlacement(wanted, rows, first)


_places = _RowPlacements()


def local_rows(value: Any, where: str) -> LocalRows:
    """Return the rows of the ``DTensor`` ``value`` that this rank holds.

    Never communicates: where the tensor is split along another dimension than the first, or is a pending sum, the rows
    are made by ``redistribute``, which does, and which every rank of the mesh must call. Raises ``UnsupportedValue``,
    which names ``where``, on a rank outside the mesh and where some rank's part is not one run of rows.
    """
    place = _places.of(value, where)
    if place.rows is None:
        raise UnsupportedValue(f"{where}: its placements {value.placements} do not give each rank one run of rows")
    if place.wanted is None:
        return LocalRows(_waited(value.to_local()), place.first, place.rows, private=False)
    rows = functools.partial(_redistributed, value, place.wanted)
    return LocalRows(value.to_local(), place.first, place.rows, private=True, redistribute=rows)


@torch.no_grad()
def _redistributed(value: Any, placements: list[Any]) -> torch.Tensor:
    return _waited(value.redistribute(placements=placements).to_local())


def _waited(local: torch.Tensor) -> torch.Tensor:
    wait = getattr(local, "wait", None)  # the values may still be on their way in an asynchronous collective
    return local if wait is None else wait()


@dataclass(frozen=True, slots=True)
class RestoreTarget:
    """``RestoreTarget`` takes the stored values of a tensor that several ranks hold. ``tensor`` is filled with the
    row-major elements of the global one from element ``first`` on. Where the live tensor is split otherwise, ``finish``
    brings them there: it communicates, so every rank of the mesh must call it."""

    tensor: torch.Tensor
    first: int
    finish: Callable[[], None] | None = None


@torch.no_grad()
def receiver(value: Any, where: str) -> RestoreTarget:
    """Return where the stored values of a live ``DTensor`` or ``ShardedTensor`` go on this rank. Raises
    ``UnsupportedValue`` as ``local_rows`` and ``sharded_tensor_rows`` do."""
    if is_sharded_tensor(value):
        local = sharded_tensor_rows(value, where)
        return RestoreTarget(local.tensor, local.first)
    from torch.distributed.tensor import DTensor

    wanted = row_placements(value)
    if wanted is None:
        local = local_rows(value, where)
        return RestoreTarget(local.tensor, local.first)
    mesh, shape = value.device_mesh, tuple(value.shape)
    rows = _spread(mesh, tuple(wanted), shape[0])
    part = rows.part_of_rank.get(torch.distributed.get_rank()) if rows is not None else None
    begin, end = (rows.bounds[part], rows.bounds[part + 1]) if rows is not None and part is not None else (0, 0)
    mine = torch.empty((end - begin, *shape[1:]), dtype=value.dtype, device=value.to_local().device)

    def finish() -> None:
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(mine, mesh, wanted, run_check=False, shape=torch.Size(shape), stride=stride)
        with torch.no_grad():
            value.to_local().copy_(whole.redistribute(placements=value.placements).to_local())

    return RestoreTarget(mine, begin * _width(shape), finish)


def like(parameter: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Return a new ``DTensor`` of zeros with the shape, mesh and placements of ``parameter`` and with this dtype, on
    ``device`` (default: that of ``parameter``)."""
    from torch.distributed.tensor import DTensor

    local = torch.zeros_like(parameter.to_local(), dtype=dtype, device=device, requires_grad=False)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def row_placements(value: Any) -> list[Any] | None:
    """Return the placements that ``local_rows`` would redistribute ``value`` to, or None where it would not."""
    return _row_placements(value.device_mesh, tuple(value.placements), value.shape[0] if value.dim() else 1)


@functools.lru_cache(maxsize=1 << 12)
def _row_placements(mesh: Any, placements: tuple[Any, ...], rows: int) -> list[Any] | None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Split

    by_rows = all(isinstance(p, Replicate) or (_splits(p) and p.dim == 0) for p in placements)
    if by_rows and _spread(mesh, placements, rows) is not None:
        return None
    return [p if isinstance(p, Replicate) else Split(0) for p in placements]


def sharded_tensor_rows(value: Any, where: str) -> LocalRows:
    """Return the rows of the ``ShardedTensor`` ``value`` that this rank holds. Raises ``UnsupportedValue``, which names
    ``where``, if this rank has several parts or if any part is not made of whole rows."""
    parts = sorted(value.metadata().shards_metadata, key=lambda part: tuple(part.shard_offsets))
    shape = tuple(value.metadata().size)
    if len(value.local_shards()) > 1 or any(tuple(p.shard_sizes[1:]) != shape[1:] for p in parts):
        raise UnsupportedValue(f"{where}: only a ShardedTensor of whole rows, one part a rank, is stored; use FSDP2")
    spans = [(p.shard_offsets[0], p.shard_sizes[0], (p.placement.rank(),)) for p in parts if p.shard_sizes[0]]
    rows = RowOwners((*(begin for begin, _, _ in spans), shape[0]), tuple(holders for _, _, holders in spans))
    mine = value.local_shards()
    if not mine:
        return LocalRows(torch.empty((0, *shape[1:]), dtype=value.dtype), 0, rows, private=True)
    return LocalRows(mine[0].tensor, mine[0].metadata.shard_offsets[0] * _width(shape), rows, private=False)


def _splits(placement: Any) -> bool:
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, Split | _StridedShard)


def _width(shape: tuple[int, ...]) -> int:
    """Return how many elements a row has."""
    count = 1
    for size in shape[1:]:
        count *= size
    return count


@functools.lru_cache(maxsize=1 << 12)
def _spread(mesh: Any, placements: tuple[Any, ...], rows: int) -> RowOwners | None:
    """Return which ranks hold which of the ``rows`` rows; every rank computes the same. It is cached so that tensors
    spread alike share one object. Returns None where a part is not one run of rows (an uneven strided split)."""
    holders: dict[tuple[int, int], list[int]] = {}
    for coordinate in itertools.product(*(range(size) for size in mesh.mesh.shape)):
        begin, count = _part((rows,), mesh, coordinate, placements)
        if count:
            holders.setdefault((begin, begin + count), []).append(int(mesh.mesh[coordinate]))
    spans = sorted(holders)
    bounds = (*(begin for begin, _ in spans), rows)
    if any(span != (begin, end) for span, begin, end in zip(spans, bounds, bounds[1:], strict=False)):
        return None
    return RowOwners(bounds, tuple(tuple(sorted(holders[span])) for span in spans))


def _part(shape: tuple[int, ...], mesh: Any, coordinate: Any, placements: Any) -> tuple[int, int]:
    """Return ``(first row, number of rows)`` of the part that the rank at this coordinate of the mesh holds."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    sizes, offsets = _compute_local_shape_and_global_offset(
        (shape[0],), tuple(mesh.mesh.shape), list(coordinate), placements
    )
    return int(offsets[0]), int(sizes[0])


#: In a forked child this holds the parent's process group, if it had one: the child is not a rank of that job.
_inherited: list[object] = []


def _leave_job() -> None:
    _inherited[:] = [torch.distributed.group.WORLD] if _initialized() else []


os.register_at_fork(after_in_child=_leave_job)


def _initialized() -> bool:
    available: Callable[[], bool] = torch.distributed.is_available
    return available() and torch.distributed.is_initialized()


def job_size() -> int:
    """Return how many ranks this process's job has: 1 where ``torch.distributed`` is not initialised, and in a rank's
    forked child."""
    if not _initialized() or torch.distributed.group.WORLD in _inherited:
        return 1
    return torch.distributed.get_world_size()


def job_rank() -> int:
    """Return this process's rank in its job: 0 where it is alone."""
    return torch.distributed.get_rank() if job_size() > 1 else 0
