"""``Reader`` lets ``dcp.load`` read this library's checkpoints."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.chosen import open_chosen
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, InvalidOption, RanksDisagree, RunPathError
from asyncckpt.integrations.dcp.names import Names, check_has_bytes, names_of
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import BoxedRecord, Manifest, StoredTensor
from asyncckpt.manifest.spread import SpreadRecord
from asyncckpt.read.boxes import TargetBox
from asyncckpt.read.fill import fill
from asyncckpt.read.opening import OpenCheckpoint, open_checkpoint
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.storage import local_path, open_store


class Reader(StorageReader):
    """``dcp.load(state, storage_reader=Reader("run"))`` loads the newest checkpoint of a run (see
    ``Run.newest``), and raises ``NewestDamaged`` rather than load an older one in its place; a path such as
    ``Reader("run/step-00000100")``, or ``checkpoint_id``, names another one. It also loads what a ``Checkpointer``
    saved: its tensors, by qualified name.

    Every byte is verified before it is used, and only the extents that are needed are read; ``dcp.load`` blocks
    meanwhile. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` and ``DigestMismatch`` (``expect_digest``, as for
    ``Run.restore``), which DCP wraps. The checkpoint holds no pickle, so none is loaded. Not thread-safe.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, expect_digest: str | None = None) -> None:
        self._path = None if path is None else local_path(path)
        self._expect_digest = manifests.check_expected(expect_digest)
        self._open: tuple[OpenCheckpoint, Names] | None = None
        #: Names this load among all, as DCP's logs and tools expect it. Each ``dcp.load`` has its own.
        self.load_id = uuid.uuid4().hex
        #: The latest load read this many bytes.
        self.read_bytes = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.close()
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        checkpoint, names = self._opened()
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for fqn in names.tensors:
            record = self._record(fqn)
            boxes = _boxes_of(record) or [((0,) * len(record.shape), record.shape)]
            chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
            properties = TensorProperties(dtype=DTYPES[record.dtype])
            entries[fqn] = TensorStorageMetadata(properties, torch.Size(record.shape), chunks)
        for fqn in names.trees:
            entries[fqn] = BytesStorageMetadata()
        return Metadata(entries, planner_data=dict(names.paths), storage_meta=self._meta(checkpoint.manifest))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self._opened()[0].manifest.attempt)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        odd = [rank for rank, plan in enumerate(plans) if plan.storage_data != plans[0].storage_data]
        if odd:
            raise RanksDisagree(
                f"{self._path}: ranks {odd[:8]} read another checkpoint than rank 0 (one was published meanwhile). "
                f"Load again, or give the checkpoint's own path"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        future: Future[None] = Future()
        try:
            self._read(plan, planner)
        finally:
            self.close()
        future.set_result(None)
        return future

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        checkpoint, names = self._opened()
        wanted: dict[str, list[TargetBox]] = {}
        committed: list[Callable[[], None]] = []
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                continue
            fqn = item.storage_index.fqn
            target = planner.resolve_tensor(item).detach()
            check_has_bytes(fqn, target)
            begin = item.storage_index.offset or torch.Size([0] * len(item.storage_offsets))
            offsets = tuple(a + b for a, b in zip(begin, item.storage_offsets, strict=True))
            wanted.setdefault(fqn, []).append(TargetBox(target, offsets))
            committed.append(lambda item=item, target=target: planner.commit_tensor(item, target))  # type: ignore[misc]
        try:
            self.read_bytes = fill(checkpoint, [(self._record(fqn), found) for fqn, found in wanted.items()])
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{error} The live tensors may be partly overwritten: load another one.") from error
        for commit in committed:
            commit()
        for item in values:
            fqn = item.storage_index.fqn
            planner.load_bytes(item, _pickled(names.value(fqn, _live(planner, item.dest_index.fqn))))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.path.isdir(checkpoint_id)

    def close(self) -> None:
        """Let retention delete the checkpoint again. Idempotent; a load ends with it. Call it where DCP's planner has
        refused a load, as the reader is not told."""
        if self._open is not None:
            self._open[0].close()
            self._open = None

    def _opened(self) -> tuple[OpenCheckpoint, Names]:
        if self._open is None:
            checkpoint = _open(self._path, self._expect_digest)
            self.load_id = uuid.uuid4().hex
            try:
                self._open = checkpoint, names_of(checkpoint.manifest, checkpoint.trees)
            except BaseException:
                checkpoint.close()
                raise
        return self._open

    def _record(self, fqn: str) -> StoredTensor:
        checkpoint, names = self._opened()
        component, name = names.tensors[fqn]
        record = checkpoint.manifest.components[component]
        return record.tensors[record.aliases.get(name, name)]

    def _meta(self, manifest: Manifest) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._path, save_id=manifest.attempt, load_id=self.load_id)


def _boxes_of(record: StoredTensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return offsets and shape of the boxes that a tensor lies in; none where it lies in no boxes. Those that parts of
    a manifest list are put together as the rows that ranks hold, so that no part is read for them."""
    if isinstance(record, SpreadRecord):
        rest = record.shape[1:]
        rows = [(low, high) for low, high, _ in record.sections(0, record.rows)] if record.shape else []
        return [((low, *(0 for _ in rest)), (high - low, *rest)) for low, high in rows]
    return [(box.offsets, box.shape) for box in record.boxes] if isinstance(record, BoxedRecord) else []


def _open(path: str | None, expect_digest: str | None) -> OpenCheckpoint:
    """Open a checkpoint by its path, or the newest of a run. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` and
    ``DigestMismatch``."""
    if path is None:
        raise InvalidOption("say which: Reader('run'), or dcp.load(..., checkpoint_id='run/step-100')")
    run, name = os.path.split(path.rstrip("/"))
    if os.path.lexists(os.path.join(path, manifests.FILE_NAME)):
        return open_checkpoint(open_store(run).open(name), expect_digest)
    if not os.path.isdir(path):
        raise CheckpointNotFound(f"{path}: no such directory")
    try:
        checkpoint = open_chosen(open_store(path), None)[1]
    except CheckpointNotFound:
        with contextlib.suppress(RunPathError, OSError):
            for entry in Catalog(
                open_store(run), run
            ).entries():  # what is left of a checkpoint, which is no run without one
                if entry.name == name:
                    raise CheckpointDamaged(f"{path}: {entry.damage}") from None
        raise
    try:
        checkpoint.require_digest(expect_digest)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _live(planner: LoadPlanner, fqn: str) -> Any:
    """Return the value that a planner is about to replace, or None where it does not say."""
    state = getattr(planner, "state_dict", None)
    return state.get(fqn) if isinstance(state, Mapping) else None


def _pickled(value: Any) -> io.BytesIO:
    """Pickle a value that was read safely, as DCP's planners insist on unpickling values."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_module=pickle)
    stream.seek(0)
    return stream
