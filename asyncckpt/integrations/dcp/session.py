"""A DCP writer has a directory, threads, and memory that is faulted in once, while it runs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from asyncckpt import forks, jsontree
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.commit.publication import begin, publish
from asyncckpt.errors import SaveFailed
from asyncckpt.integrations.dcp.names import Path, components_of
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.draft import finished_draft
from asyncckpt.manifest.records import FileRecord, StoredTensor
from asyncckpt.memory import cuda
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.memory.region import address_of
from asyncckpt.protocols import Digest, Hold, PendingDirectory
from asyncckpt.stage.copy import copy_segments, write_header
from asyncckpt.storage import open_store
from asyncckpt.types import Extent, JsonValue, LayoutOptions, LocalTensor, ShardFile
from asyncckpt.write.made_shards import write_made_shards

#: This many threads keep one device busy while others copy and hash.
THREADS = min(4, max(2, os.cpu_count() or 2))


class Stager(DefaultStager):
    """``dcp.async_save(..., async_stager=Stager())`` stages with torch's own stager, set for this machine. It keeps its
    host memory from save to save; where there is an accelerator, that memory is pinned and copied to in the background.
    Keep one stager for all saves."""

    def __init__(self) -> None:
        fast = torch.accelerator.is_available()
        super().__init__(
            StagingOptions(
                use_pinned_memory=fast, use_shared_memory=False, use_async_staging=fast, use_non_blocking_copy=fast
            )
        )


class WriterSession:
    """``WriterSession`` holds what a writer has only while it runs; it is never pickled."""

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self._empty()
        forks.disarm_in_child(self)

    def disarm(self) -> None:
        # letting torch's stager go would call CUDA
        self._inherited += [self.stager, self.staging]
        self._empty()

    def _empty(self) -> None:
        self.directory: PendingDirectory | None = None
        self.hold: Hold | None = None
        self.stager: Stager | None = None
        self.staging: Stager | None = None
        self.staged = False
        #: Writing threads reuse this memory, which is faulted in.
        self.buffers: list[StagingBuffer] = []
        self._catalog: Catalog | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give everything back, and remove a save that was not published. Idempotent."""
        if self.directory is not None:
            self.directory.discard()
        self.end()
        if self.stager is not None:
            self.stager.close()
            self.stager = None
        self.buffers.clear()

    def begin(self, run: str, name: str, step: int, *, overwrite: bool) -> PendingDirectory:
        """Take the run directory and make the attempt's. Raises ``StepExists``, ``RunLocked`` and ``RunPathError``."""
        if self.directory is not None:  # its save failed on another rank
            self.directory.discard()
            self.end()
        store = open_store(run)
        if self._catalog is None or self._catalog.path != store.address:
            self._catalog = Catalog(store, store.address)
        self.hold, self.directory = begin(store, self._catalog, name, step, overwrite=overwrite)
        return self.directory

    def next_step(self, run: str) -> int:
        """Return the step after the newest that the directory has a checkpoint of, or 0. Blocks on the disk."""
        if not os.path.isdir(run):
            return 0
        store = open_store(run)
        return 1 + max((entry.step for entry in Catalog(store, store.address).entries()), default=-1)

    def end(self) -> None:
        """Give the run directory back, however the save ended."""
        self.directory = None
        if self.hold is not None:
            self.hold.release()
            self.hold = None

    def write(
        self,
        directory: PendingDirectory,
        shards: Sequence[ShardFile],
        pieces: Sequence[LocalTensor],
        digest: Digest,
        threads: int,
    ) -> list[FileRecord]:
        """Write all extents of all shards on several threads, and return the files' records. Everything is durable
        then."""
        tensors = [piece.tensor for piece in pieces]

        @contextlib.contextmanager
        def made(window: Sequence[Extent]) -> Iterator[memoryview]:
            (extent,) = window
            with self._slot(extent.nbytes) as slot:
                write_header(slot, 0, extent.header)
                _copy(tensors, extent, slot)
                yield slot.view

        records = write_made_shards(directory, shards, made, digest, threads=threads)
        directory.sync_directory()
        return records

    def publish(
        self,
        name: str,
        step: int,
        files: Sequence[FileRecord],
        records: Mapping[str, StoredTensor],
        paths: Mapping[str, Path],
        values: Mapping[str, Any],
        *,
        digest: str,
        metrics: Mapping[str, float],
        world_size: int,
        overwrite: bool,
        imported: Mapping[str, JsonValue] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Publish what ``write`` has written on all ranks: a checkpoint, durable on return. ``imported``: what it
        records of another format's checkpoint that it was made of. ``before``: see ``commit.publication.publish``."""
        directory, hold, catalog = self.directory, self.hold, self._catalog
        if directory is None or hold is None or catalog is None:
            raise SaveFailed("no save has begun")
        components, trees = components_of(records, paths, values)
        small = {manifests.STATE_FILE: jsontree.dumps(trees)}
        directory.write_small(small)
        draft = finished_draft(
            files,
            small,
            step=step,
            name=name,
            attempt=directory.uuid,
            kind="full",
            digest=digest,
            layout="ranks",
            sequence=catalog.next_sequence(),
            components=components,
            metrics=metrics,
            world_size=world_size,
            imported=imported,
        )
        # never publish what no reader takes: planners of others may have made names that none would
        manifests.decode(manifests.encode(draft), f"{directory.path}/{manifests.FILE_NAME}")

        def check() -> None:
            before()
            hold.check()

        publish(directory, draft, replace=overwrite, before=check)
        self.end()

    @contextlib.contextmanager
    def _slot(self, nbytes: int) -> Any:
        with self._lock:
            slot = self.buffers.pop() if self.buffers else None
        if slot is None or slot.nbytes < nbytes:
            buffer = memoryview(aligned_buffer(max(nbytes, LayoutOptions().extent_bytes)))
            slot = StagingBuffer(-1, 0, len(buffer), address_of(buffer), buffer)
        try:
            yield slot
        finally:
            with self._lock:
                self.buffers.append(slot)


def _copy(tensors: Sequence[torch.Tensor], extent: Extent, slot: StagingBuffer) -> None:
    """Copy an extent's tensors into the slot. Blocks until their devices have."""
    devices = {tensors[segment.piece].device for segment in extent.segments} - {torch.device("cpu")}
    with contextlib.ExitStack() as stack:
        for device in devices:
            if device.type == "cuda":
                stack.enter_context(cuda.on(device))
        copy_segments(tensors, extent.segments, slot)
        for device in devices:
            torch.accelerator.synchronize(device)
