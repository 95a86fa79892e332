"""What a DCP writer has while it runs: a directory, threads, and memory that is faulted in once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from asyncckpt import forks, jsontree
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.codecs import digests
from asyncckpt.errors import SaveFailed, StepExists
from asyncckpt.integrations.dcp.names import Path, components_of
from asyncckpt.manifest import environment
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest, StoredTensor, WrittenExtent
from asyncckpt.memory.arena import Slot
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Attempt, Digest
from asyncckpt.stage.copy import copy_segments, write_header
from asyncckpt.stage.image import cut_digests
from asyncckpt.storage.lease import Lease
from asyncckpt.storage.local import LocalStore
from asyncckpt.types import Extent, LayoutOptions, Piece, Shard

#: Enough to keep one device busy while others copy and hash.
THREADS = min(4, max(2, os.cpu_count() or 2))


class Stager(DefaultStager):
    """``dcp.async_save(..., async_stager=Stager())``: torch's own, with what this machine has: memory that is kept
    from save to save, pinned and copied to in the background where there is an accelerator. Keep one for all saves."""

    def __init__(self) -> None:
        fast = torch.accelerator.is_available()
        super().__init__(
            StagingOptions(
                use_pinned_memory=fast, use_shared_memory=False, use_async_staging=fast, use_non_blocking_copy=fast
            )
        )


class Live:
    """What a writer has while it runs; never pickled."""

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self._empty()
        forks.disarm_in_child(self)

    def disarm(self) -> None:
        # torch's stager would call CUDA where it is let go
        self._inherited += [self.stager, self.staging]
        self._empty()

    def _empty(self) -> None:
        self.attempt: Attempt | None = None
        self.lease: Lease | None = None
        self.stager: Stager | None = None
        self.staging: Stager | None = None
        self.staged = False
        #: Faulted-in memory that writing threads reuse.
        self.buffers: list[Slot] = []
        self._catalog: Catalog | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give everything back; a save that was not published is removed. Idempotent."""
        if self.attempt is not None:
            self.attempt.discard()
        self.end()
        if self.stager is not None:
            self.stager.close()
            self.stager = None
        self.buffers.clear()

    def begin(self, run: str, name: str, step: int, *, overwrite: bool) -> Attempt:
        """Take the run directory and make the attempt's. Raises ``StepExists``, ``RunLocked`` and ``RunPathError``."""
        if self.attempt is not None:  # of a save that failed on another rank
            self.attempt.discard()
            self.end()
        store = LocalStore(run)
        store.prepare(create_parents=True)
        if os.path.lexists(os.path.join(run, name)) and not overwrite:
            raise StepExists(f"{run}/{name} already exists; save another step, or pass overwrite=True")
        if self._catalog is None or self._catalog.path != store.path:
            self._catalog = Catalog(store, store.path)
        damaged = self._catalog.must_be_kept(name)
        self.lease = Lease.acquire(run)
        try:
            store.reclaim()
            self._catalog.settle_replaced()
            if damaged:
                store.set_aside(name)
            self.attempt = store.begin(step, uuid.uuid4().hex)
        except BaseException:
            self.end()
            raise
        return self.attempt

    def end(self) -> None:
        """The save is over, whichever way."""
        self.attempt = None
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def write(
        self,
        attempt: Attempt,
        shards: Sequence[Shard],
        pieces: Sequence[Piece],
        digest: Digest,
        threads: int,
    ) -> list[FileRecord]:
        """All extents of all shards, on several threads; durable on return."""
        writers = [attempt.create_shard(shard.file, shard.nbytes) for shard in shards]

        def one(extent: Extent) -> list[ExtentRecord]:
            with self._slot(extent.nbytes) as slot:
                write_header(slot, extent.header)
                copy_segments(pieces, extent.segments, slot)
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                view = slot.view[: extent.nbytes]
                written = WrittenExtent(extent.offset, extent.nbytes, cut_digests(digest, view, extent.cuts))
                writers[extent.shard].write_at(slot.view, extent.nbytes, extent.offset)
            return written.records(extent.cuts)

        with ThreadPoolExecutor(threads, "asyncckpt-dcp") as pool:
            found = list(pool.map(one, (extent for shard in shards for extent in shard.extents)))
            list(pool.map(lambda pair: pair[0].finish(pair[1].nbytes), zip(writers, shards, strict=True)))
        attempt.sync_directory()
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
    ) -> None:
        """Small files, manifest, directory, name: in that order, each durable before the next."""
        attempt, lease, catalog = self.attempt, self.lease, self._catalog
        if attempt is None or lease is None or catalog is None:
            raise SaveFailed("no save has begun")
        components, trees = components_of(records, paths, values)
        small = {manifests.STATE_FILE: jsontree.dumps(trees)}
        asyncio.run(attempt.write_small(small))
        attempt.sync_directory()
        take = digests.get(digest)
        data = manifests.encode(
            Manifest(
                step=step,
                name=name,
                attempt=attempt.uuid,
                kind="full",
                created_unix_seconds=time.time(),
                world_size=world_size,
                shard_format="safetensors",
                digest=digest,
                layout="ranks",
                metrics=metrics,
                config=None,
                environment=environment.record(),
                files=(*files, *(manifests.whole_file(file, body, take) for file, body in small.items())),
                components=components,
                sequence=1 + max((entry.sequence for entry in catalog.entries(fresh=False)), default=0),
            )
        )
        manifests.decode(data, f"{attempt.path}/{manifests.FILE_NAME}")  # never publish what no reader takes
        asyncio.run(attempt.write_small({manifests.FILE_NAME: data}))
        attempt.sync_directory()
        lease.check()
        attempt.publish(name, replace=overwrite)
        self.end()

    @contextlib.contextmanager
    def _slot(self, nbytes: int) -> Any:
        with self._lock:
            slot = self.buffers.pop() if self.buffers else None
        if slot is None or slot.nbytes < nbytes:
            buffer = memoryview(aligned_buffer(max(nbytes, LayoutOptions().extent_bytes)))
            tensor = torch.frombuffer(buffer, dtype=torch.uint8)
            slot = Slot(-1, 0, len(buffer), tensor.data_ptr(), buffer, tensor)
        try:
            yield slot
        finally:
            with self._lock:
                self.buffers.append(slot)
