"""An imported checkpoint is written here: as a save writes one, but of tensors that are read piece by piece."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from asyncckpt import jsontree
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.names import DEFAULT
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.commit.publication import begin, publish
from asyncckpt.convert.source import Progress
from asyncckpt.convert.tensors import SourceTensor
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.component_rows import components_of, describe
from asyncckpt.manifest.draft import finished_draft
from asyncckpt.manifest.records import FileRecord
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Digest, PendingDirectory
from asyncckpt.storage import open_store
from asyncckpt.types import ComponentSnapshot, Extent, JsonValue, Layout
from asyncckpt.write.made_shards import write_made_shards

#: So many threads read and write at a time, each of which waits for the device most of the time. More of them would go
#: through a source so far apart that its blocks are read twice (``source_file``).
_THREADS = 4


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
        name, catalog = DEFAULT.format(step=step), Catalog(store, store.address)
        hold, directory = begin(store, catalog, name, step, overwrite=overwrite)
        try:
            files = self._write_shards(directory)
            small = {manifests.STATE_FILE: jsontree.dumps({one.name: one.tree for one in self.snapshots})}
            small |= self._small_files() | dict(self.assets)
            directory.write_small(small)
            draft = finished_draft(
                files,
                small,
                step=step,
                name=name,
                attempt=directory.uuid,
                kind="full",
                digest=digest,
                layout=self.layout.fingerprint,
                sequence=catalog.next_sequence(),
                metrics=metrics,
                assets=self.assets,
                imported=origin(),
            )

            def check() -> None:
                before()
                hold.check()

            publish(directory, draft, components_json=self._components(), replace=overwrite, before=check)
        except BaseException:
            directory.discard()
            raise
        finally:
            hold.release()
        return f"{store.address}/{name}"

    def _components(self) -> bytes:
        kinds = {one.name: one.kind for one in self.snapshots}
        aliases = {one.name: one.aliases for one in self.snapshots}
        described = {one.name: describe(one) for one in self.snapshots}
        orders = {shard.file: range(len(shard.extents)) for shard in self.layout.shards}
        return jsontree.dumps(components_of(self.layout, kinds, aliases, described, orders))

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
        largest = max((extent.nbytes for shard in shards for extent in shard.extents), default=0)
        local, lock, done = threading.local(), threading.Lock(), [0]

        @contextlib.contextmanager
        def made(window: Sequence[Extent]) -> Iterator[memoryview]:
            (extent,) = window
            buffer: memoryview | None = getattr(local, "buffer", None)
            if buffer is None:
                buffer = local.buffer = memoryview(aligned_buffer(largest))
            self._read(extent, buffer[: extent.nbytes])
            yield buffer
            with lock:
                done[0] += extent.nbytes
                self.progress("writing", done[0], self.layout.nbytes)

        return write_made_shards(directory, shards, made, self.take, threads=_THREADS)

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
