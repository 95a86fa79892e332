"""What a DCP writer has while it runs: a directory, threads, and memory that is faulted in once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from asyncckpt.arena import Slot, aligned_buffer
from asyncckpt.copying import copy_segments, write_header
from asyncckpt.encoder import cut_digest
from asyncckpt.protocols import Attempt, Digest, Extent, LayoutOptions, Piece, Shard
from asyncckpt.records import ExtentRecord, FileRecord, split_record
from asyncckpt.storage.lease import Lease


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
        self.attempt: Attempt | None = None
        self.lease: Lease | None = None
        self.stager: Stager | None = None
        self.staging: Stager | None = None
        self.staged = False
        #: Faulted-in memory that writing threads reuse.
        self.buffers: list[Slot] = []
        self._lock = threading.Lock()

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
                record = ExtentRecord(extent.offset, extent.nbytes, cut_digest(digest, view, extent.cuts))
                writers[extent.shard].write_at(slot.view, extent.nbytes, extent.offset)
            return split_record(record, extent.cuts)

        with ThreadPoolExecutor(threads, "asyncckpt-dcp") as pool:
            found = list(pool.map(one, (extent for shard in shards for extent in shard.extents)))
            list(pool.map(lambda pair: pair[0].finish(pair[1].nbytes), zip(writers, shards, strict=True)))
        attempt.sync_directory()
        records: list[FileRecord] = []
        for shard in shards:
            mine, found = found[: len(shard.extents)], found[len(shard.extents) :]
            records.append(FileRecord(shard.file, shard.nbytes, tuple(part for parts in mine for part in parts)))
        return records

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
