"""An imported checkpoint is written here: as a save writes one, but of tensors that are read piece by piece."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from asyncckpt import jsontree
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.names import DEFAULT
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.commit.publication import publish, take_over
from asyncckpt.convert.source import Progress
from asyncckpt.convert.tensors import SourceTensor
from asyncckpt.errors import StepExists
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.manifest import environment
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest, WrittenExtent
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Digest, PendingDirectory, renaming
from asyncckpt.stage.image import cut_digests
from asyncckpt.storage import open_store
from asyncckpt.types import ALIGNMENT_BYTES, ComponentSnapshot, Extent, JsonValue, Layout

#: So many threads keep one device busy while others read and hash.
_THREADS = min(4, max(2, os.cpu_count() or 2))


@dataclass
class CheckpointWriting:
    """Writes one checkpoint: ``tensors[i]`` is read for piece ``i`` of the layout."""

    snapshots: Sequence[ComponentSnapshot]
    tensors: Sequence[SourceTensor]
    layout: Layout
    assets: Mapping[str, bytes]
    take: Digest
    progress: Progress

    def write(
        self,
        run: str,
        step: int,
        *,
        overwrite: bool,
        digest: str,
        metrics: Mapping[str, float],
        origin: Callable[[], dict[str, JsonValue]],
        before: Callable[[], None],
    ) -> str:
        store = open_store(run)
        name = DEFAULT.format(step=step)
        if store.listing(name) and not overwrite:
            raise StepExists(f"{store.address}/{name} already exists; import as another step, or pass overwrite=True")
        catalog = Catalog(store, store.address)
        hold = take_over(store, create_parents=True)
        directory: PendingDirectory | None = None
        try:
            mover = renaming(store)
            if catalog.must_be_kept(name) and mover is not None:
                mover.set_aside(name)
            directory = store.begin(step, uuid.uuid4().hex, name=name)
            files = self._write_shards(directory)
            small = {manifests.STATE_FILE: jsontree.dumps({one.name: one.tree for one in self.snapshots})}
            small |= self._small_files() | dict(self.assets)
            directory.write_small(small)
            draft = Manifest(
                step=step,
                name=name,
                attempt=directory.uuid,
                kind="full",
                created_unix_seconds=time.time(),
                world_size=1,
                shard_format="safetensors",
                digest=digest,
                layout=self.layout.fingerprint,
                metrics=metrics,
                config=None,
                environment={**environment.record(), "imported": origin()},
                files=(*files, *(manifests.whole_file(file, body, self.take) for file, body in small.items())),
                components={},
                least_version=manifests.version_of_values(small[manifests.STATE_FILE], None),
                sequence=1 + max((entry.sequence for entry in catalog.entries(fresh=False)), default=0),
                assets=tuple(self.assets),
            )

            def check() -> None:
                before()
                hold.check()

            publish(directory, draft, components_json=self._components(), replace=overwrite, before=check)
        except BaseException:
            if directory is not None:
                directory.discard()
            raise
        finally:
            hold.release()
        return f"{store.address}/{name}"

    def _components(self) -> bytes:
        kinds = {one.name: one.kind for one in self.snapshots}
        aliases = {one.name: one.aliases for one in self.snapshots}
        described = {one.name: manifests.describe(one) for one in self.snapshots}
        orders = {shard.file: range(len(shard.extents)) for shard in self.layout.shards}
        return jsontree.dumps(manifests.components_of(self.layout, kinds, aliases, described, orders))

    def _small_files(self) -> dict[str, bytes]:
        shape, none = SafetensorsFormat(), get_codec("none", {})
        found: dict[str, bytes] = {}
        for one in self.snapshots:
            shards = [shard for shard in self.layout.shards if shard.component == one.name]
            found |= shape.small_files(one.name, shards, none) if shards else {}
        modules = [one.name for one in self.snapshots if one.kind == "module"]
        indexed = "model" if "model" in modules else modules[0] if len(modules) == 1 else None
        return found | shape.root_files([s for s in self.layout.shards if s.component == indexed], self.assets)

    def _write_shards(self, directory: PendingDirectory) -> list[FileRecord]:
        shards = self.layout.shards
        writers = [directory.create_shard(shard.file, shard.nbytes) for shard in shards]
        largest = max((extent.nbytes for shard in shards for extent in shard.extents), default=0)
        local, lock, done = threading.local(), threading.Lock(), [0]

        def one(extent: Extent) -> list[ExtentRecord]:
            buffer: memoryview | None = getattr(local, "buffer", None)
            if buffer is None:
                buffer = local.buffer = memoryview(aligned_buffer(largest + 2 * ALIGNMENT_BYTES))
            first = extent.offset % ALIGNMENT_BYTES
            view = buffer[first : first + extent.nbytes]
            self._read(extent, view)
            written = WrittenExtent(
                extent.offset, extent.nbytes, cut_digests(self.take, view, extent.digest_boundaries)
            )
            writers[extent.shard].write_at(buffer[first:], extent.nbytes, extent.offset)
            with lock:
                done[0] += extent.nbytes
                self.progress("writing", done[0], self.layout.nbytes)
            return written.records(extent.digest_boundaries)

        try:
            with ThreadPoolExecutor(_THREADS, "asyncckpt-import") as pool:
                waiting = [[pool.submit(one, extent) for extent in shard.extents] for shard in shards]
                try:
                    records = [[part for future in futures for part in future.result()] for futures in waiting]
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            for writer, shard in zip(writers, shards, strict=True):
                writer.finish(shard.nbytes)
        except BaseException:
            for writer in writers:
                writer.abort()
            raise
        directory.sync_directory()
        return [
            FileRecord(shard.file, shard.nbytes, tuple(found)) for shard, found in zip(shards, records, strict=True)
        ]

    def _read(self, extent: Extent, view: memoryview) -> None:
        """Fill ``view`` with the bytes of an extent: its header, parts of tensors, and zeros between and after them."""
        view[: len(extent.header)] = extent.header
        at = len(extent.header)
        for segment in sorted(extent.segments, key=lambda one: one.extent_offset):
            if segment.extent_offset > at:
                view[at : segment.extent_offset] = bytes(segment.extent_offset - at)
            at = segment.extent_offset + segment.nbytes
            self.tensors[segment.piece].read_into(segment.source_offset, view[segment.extent_offset : at])
        if at < extent.nbytes:
            view[at:] = bytes(extent.nbytes - at)
