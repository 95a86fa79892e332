"""A DCP writer has a directory, threads, and memory that is faulted in once, while it runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from asyncckpt import forks, jsontree
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.codecs import digests
from asyncckpt.commit.publication import publish, take_over
from asyncckpt.errors import SaveFailed, StepExists
from asyncckpt.integrations.dcp.names import Path, components_of
from asyncckpt.manifest import environment
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest, StoredTensor, WrittenExtent
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.memory.region import address_of
from asyncckpt.protocols import Digest, Hold, PendingDirectory, renaming
from asyncckpt.stage.copy import copy_segments, write_header
from asyncckpt.stage.image import cut_digests
from asyncckpt.storage import open_store
from asyncckpt.types import Extent, JsonValue, LayoutOptions, LocalTensor, ShardFile

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
        if store.listing(name) and not overwrite:  # an empty directory is no checkpoint
            raise StepExists(f"{store.address}/{name} already exists; save another step, or pass overwrite=True")
        if self._catalog is None or self._catalog.path != store.address:
            self._catalog = Catalog(store, store.address)
        damaged = self._catalog.must_be_kept(name)
        self.hold = take_over(store, create_parents=True)
        try:
            mover = renaming(store)
            if damaged and mover is not None:
                mover.set_aside(name)
            self.directory = store.begin(step, uuid.uuid4().hex, name=name)
        except BaseException:
            self.end()
            raise
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
        writers = [directory.create_shard(shard.file, shard.nbytes) for shard in shards]
        tensors = [piece.tensor for piece in pieces]

        def one(extent: Extent) -> list[ExtentRecord]:
            with self._slot(extent.nbytes) as slot:
                write_header(slot, 0, extent.header)
                copy_segments(tensors, extent.segments, slot)
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                view = slot.view[: extent.nbytes]
                written = WrittenExtent(
                    extent.offset, extent.nbytes, cut_digests(digest, view, extent.digest_boundaries)
                )
                writers[extent.shard].write_at(slot.view, extent.nbytes, extent.offset)
            return written.records(extent.digest_boundaries)

        with ThreadPoolExecutor(threads, "asyncckpt-dcp") as pool:
            found = list(pool.map(one, (extent for shard in shards for extent in shard.extents)))
            list(pool.map(lambda pair: pair[0].finish(pair[1].nbytes), zip(writers, shards, strict=True)))
        directory.sync_directory()
        records: list[FileRecord] = []
        for shard in shards:
            mine, found = found[: len(shard.extents)], found[len(shard.extents) :]
            records.append(FileRecord(shard.file, shard.nbytes, tuple(part for parts in mine for part in parts)))
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
        imported: JsonValue = None,
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
        take = digests.get(digest)
        draft = Manifest(
            step=step,
            name=name,
            attempt=directory.uuid,
            kind="full",
            created_unix_seconds=time.time(),
            world_size=world_size,
            shard_format="safetensors",
            digest=digest,
            layout="ranks",
            metrics=metrics,
            config=None,
            environment={**environment.record(), **({"imported": imported} if imported else {})},
            files=(*files, *(manifests.whole_file(file, body, take) for file, body in small.items())),
            components=components,
            least_version=manifests.version_of_values(small[manifests.STATE_FILE], None),
            sequence=1 + max((entry.sequence for entry in catalog.entries(fresh=False)), default=0),
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
