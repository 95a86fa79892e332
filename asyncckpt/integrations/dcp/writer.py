"""``Writer`` lets ``dcp.save`` and ``dcp.async_save`` write this library's checkpoints."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from asyncckpt import jsontree
from asyncckpt.catalog.names import DEFAULT
from asyncckpt.catalog.step_number import step_number
from asyncckpt.codecs import digests
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.errors import InvalidOption, SaveFailed, UnsupportedValue
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.integrations.dcp.names import Path, check_has_bytes, encode_value, place_of
from asyncckpt.integrations.dcp.session import THREADS, Stager, WriterSession
from asyncckpt.manifest.records import BoxedRecord, BoxRecord, FileRecord, StoredTensor
from asyncckpt.protocols import PendingDirectory
from asyncckpt.state.dtypes import CODES
from asyncckpt.storage import local_path, open_store
from asyncckpt.types import LayoutOptions, LocalTensor, TensorSpec

#: Names that say which step they are of. Any other number in a path is a part of somebody's name.
_STEP = re.compile(r"(?:.*[^A-Za-z])?(?:(?:global_?)?step|checkpoint|ckpt|iter(?:ation)?)[-_=]?(\d{1,18})|(\d{1,18})")


class Writer(StorageWriter):
    """``dcp.save(state, storage_writer=Writer("run", step=100))`` saves step 100 of a run. So does
    ``checkpoint_id="run/step-00000100"``.

    ``path`` is the run directory. ``step`` defaults to the one that ``checkpoint_id``'s name says (``step-100``,
    ``checkpoint-100``, ``global_step100``, ``100``), and for any other name to the one after the newest beside it. A
    checkpoint saved with ``checkpoint_id`` is published under exactly that path, where an empty directory may be.
    ``overwrite`` replaces one of that name in one instant.
    ``digest`` is the algorithm that proves the bytes, as in ``WriterOptions``. ``dcp.async_save`` uses the writer as
    its stager too: host memory is faulted in (and pinned, where there are GPUs) once, not at every save.

    What DCP calls blocks on the disk. It raises ``StepExists``, ``RunLocked``, ``SaveFailed`` and ``UnsupportedValue``
    (a value that could only be pickled), which DCP wraps in its ``CheckpointException`` on every rank. Nothing is
    visible unless all ranks succeeded; the next save deletes what a failed one left. Deduplicated plans, resharding and
    any planner work; plan caching does not (``InvalidOption``). Not thread-safe: make one save at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        step: SupportsIndex | None = None,
        overwrite: bool = False,
        digest: str = "xxh3-128",
        metrics: Mapping[str, float] | None = None,
        threads: int = THREADS,
    ) -> None:
        digests.get(digest)
        if type(threads) is not int or threads < 1:
            raise InvalidOption(f"threads must be a whole number >= 1, not {threads!r}")
        self._run = None if path is None else local_path(path)
        self._step = None if step is None else step_number(step)
        #: Names this save among all, as DCP's logs and tools expect it. Each ``dcp.save`` has its own.
        self.save_id = uuid.uuid4().hex
        self._overwrite = overwrite
        self._digest = digest
        self._metrics = dict(metrics or {})
        self._threads = threads
        self.checkpoint_id: str | None = None
        self._placed: tuple[str, str, int] | None = None
        self._rank = 0
        self._coordinates = False
        self._paths: dict[str, Path] = {}
        self._live = WriterSession()

    # -- what DCP calls ----------------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.checkpoint_id = None if checkpoint_id is None else local_path(checkpoint_id)
        self.save_id = uuid.uuid4().hex
        self._placed = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._coordinates = is_coordinator
        self._rank = int(kwargs.get("rank", 0))
        if not kwargs.get("use_collectives", True):
            raise InvalidOption("asyncckpt publishes one checkpoint of all ranks: leave use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not plan.usable:
            raise InvalidOption("asyncckpt's Writer does not work with enable_plan_caching=True; leave it out")
        self._paths = dict(plan.planner_data or {})
        for item in plan.items:
            if item.tensor_data is not None:  # DCP's own planner stumbles over some of these in its next step
                properties = item.tensor_data.properties
                _check_storable(item.index.fqn, properties.dtype, properties.layout)
        if self._coordinates:
            run, name, step = self._place()
            self._begin(run, name, step)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        directory = self._live.directory
        if directory is None:
            raise SaveFailed("the coordinator has begun no save")
        told = (*self._place(), directory.uuid)
        return [replace(plan, storage_data=told) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        run, name, step, attempt_uuid = plan.storage_data
        directory = self._live.directory
        if directory is None:
            directory = open_store(run).begin(step, attempt_uuid, name=name, shared=True)
        future: Future[list[WriteResult]] = Future()
        try:
            future.set_result(self._write(directory, plan.items, planner))
        except BaseException:
            directory.discard() if self._coordinates else directory.close()
            self._live.end()
            raise
        finally:
            self._live.staged = False
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        directory = self._live.directory
        if directory is None:
            raise SaveFailed("the coordinator has begun no save")
        try:
            self._publish(metadata, results)
        except BaseException:
            directory.discard()
            raise
        finally:
            self._live.end()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id or self._run, save_id=self.save_id)

    # -- staging for dcp.async_save ----------------------------------------------------------------------------------

    @property
    def should_synchronize_after_execute(self) -> bool:
        return True

    def stage(self, state_dict: Any) -> Any:
        """Copy the state into host memory that later saves reuse, or into new memory while an earlier copy is still
        being written. Blocks unless an accelerator copies in the background: ``synchronize_staging`` waits for that."""
        reusable = not self._live.staged
        if self._live.stager is None or not reusable:
            stager = Stager()
            if reusable:
                self._live.stager = stager
        else:
            stager = self._live.stager
        self._live.staged = True
        self._live.staging = stager
        return stager.stage(state_dict)

    def synchronize_staging(self) -> None:
        """Block until the state has been copied."""
        if self._live.staging is not None:
            self._live.staging.synchronize_staging()

    def close(self) -> None:
        """Give memory and the run directory back, and remove a save that failed elsewhere. Idempotent."""
        self._live.close()

    # -- one save ----------------------------------------------------------------------------------------------------

    def _place(self) -> tuple[str, str, int]:
        """Return the run directory, the checkpoint's name and the step; the same until ``reset``. Raises
        ``InvalidOption`` where one is missing."""
        if self._placed is None:
            self._placed = self._find_place()
        return self._placed

    def _find_place(self) -> tuple[str, str, int]:
        name, run, step = None, self._run, self._step
        if self.checkpoint_id is not None:
            run, name = os.path.split(self.checkpoint_id)
        if run is None:
            raise InvalidOption("say where: Writer('run', step=100), or dcp.save(..., checkpoint_id='run/step-100')")
        if step is None and name is None:
            raise InvalidOption(f"{run}: say which step: Writer(..., step=100), or checkpoint_id='run/step-100'")
        if step is None:
            said = _STEP.fullmatch(name or "")
            step = int(said[1] or said[2]) if said else self._live.next_step(run)
        return run, name or DEFAULT.format(step=step), step

    def _begin(self, run: str, name: str, step: int) -> None:
        self._live.begin(run, name, step, overwrite=self._overwrite)

    def _write(
        self, directory: PendingDirectory, items: Sequence[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        values = [item for item in items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
        results = [self._value(item, planner) for item in values]
        pieces: list[LocalTensor] = []
        for item in tensors:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, torch.Tensor):
                raise UnsupportedValue(f"{item.index.fqn}: planned as a tensor, and is a {type(tensor).__name__}")
            pieces.append(_piece(item, tensor.detach(), self._paths))
        shards = SafetensorsFormat().shards(
            f"rank-{self._rank:05d}", [piece.spec for piece in pieces], 0, 0, get_codec("none", {}), LayoutOptions()
        )
        records = self._live.write(directory, shards, pieces, digests.get(self._digest), self._threads)
        at = {placement.spec.name: (shard.file, placement) for shard in shards for placement in shard.placements}
        for item, piece in zip(tensors, pieces, strict=True):
            file, placement = at[piece.spec.name]
            chunk, data = _chunk(item)
            box = (tuple(chunk.offsets), tuple(chunk.sizes), file, placement.begin, placement.end)
            stored = {"dtype": piece.spec.dtype, "shape": tuple(data.size), "box": box}
            results.append(WriteResult(item.index, piece.spec.nbytes, stored))
        if results:
            results[0].storage_data["files"] = records
        return results

    def _value(self, item: WriteItem, planner: SavePlanner) -> WriteResult:
        """Encode a value that is not a tensor as JSON. DCP would hand it over pickled, so the planner is asked for the
        object itself."""
        fqn = item.index.fqn
        lookup = getattr(planner, "lookup_object", None)
        if lookup is None:
            raise UnsupportedValue(
                f"{fqn}: {type(planner).__name__} only gives it pickled; use a planner with lookup_object, such as "
                f"DefaultSavePlanner"
            )
        return WriteResult(item.index, 0, {"value": encode_value(lookup(item.index), fqn)})

    def _publish(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
        _, name, step = self._place()
        paths = {fqn: tuple(path) for fqn, path in (metadata.planner_data or {}).items()}
        files: list[FileRecord] = []
        values: dict[str, Any] = {}
        boxes: dict[str, list[BoxRecord]] = {}
        told: dict[str, Mapping[str, Any]] = {}
        for one in (one for rank in results for one in rank):
            stored = one.storage_data
            files += stored.get("files", ())
            if "value" in stored:
                values[one.index.fqn] = jsontree.Encoded(stored["value"])
            else:
                told[one.index.fqn] = stored
                boxes.setdefault(one.index.fqn, []).append(BoxRecord(*stored["box"]))
        records: dict[str, StoredTensor] = {fqn: _record(told[fqn], found) for fqn, found in boxes.items()}
        self._live.publish(
            name,
            step,
            files,
            records,
            paths,
            values,
            digest=self._digest,
            metrics=self._metrics,
            world_size=len(results),
            overwrite=self._overwrite,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._live = WriterSession()


def _check_storable(fqn: str, dtype: torch.dtype, layout: torch.layout) -> str:
    """Return the code of a tensor's dtype. Raises ``UnsupportedValue`` for a tensor that has no dense bytes."""
    code = CODES.get(dtype)
    if layout is not torch.strided:
        raise UnsupportedValue(f"{fqn}: layout {layout} is not stored; call .to_dense() or store its parts")
    if code is None:
        raise UnsupportedValue(f"{fqn}: {dtype} has no code in safetensors; convert it")
    return code


def _piece(item: WriteItem, tensor: torch.Tensor, paths: Mapping[str, Path]) -> LocalTensor:
    fqn = item.index.fqn
    code = _check_storable(fqn, tensor.dtype, tensor.layout)
    check_has_bytes(fqn, tensor)
    chunk, _ = _chunk(item)
    if tuple(tensor.shape) != tuple(chunk.sizes):
        raise SaveFailed(f"{fqn}: planned as {list(chunk.sizes)}, and is {list(tensor.shape)}")
    box = BoxRecord(tuple(chunk.offsets), tuple(chunk.sizes), "", 0, 0)
    name = box.entry(".".join(place_of(fqn, paths.get(fqn))))
    return LocalTensor(TensorSpec(name, code, tuple(tensor.shape), tensor.numel() * tensor.element_size()), tensor)


def _chunk(item: WriteItem) -> tuple[ChunkStorageMetadata, Any]:
    data = item.tensor_data
    if data is None:
        raise SaveFailed(f"{item.index.fqn}: the plan has a tensor without its shape")
    return data.chunk, data


def _record(stored: Mapping[str, Any], boxes: Sequence[BoxRecord]) -> BoxedRecord:
    ordered = tuple(sorted(boxes, key=lambda box: box.offsets))
    return BoxedRecord(stored["dtype"], stored["shape"], sum(box.end - box.begin for box in ordered), ordered)
