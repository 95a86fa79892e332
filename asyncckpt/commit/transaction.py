"""A transaction takes one save from staged extents to a published checkpoint.

Shards and small files are written and durable before ``publication.publish`` makes a checkpoint of them. Digests are
taken from the staged bytes before they are written. Any error poisons the attempt; nothing is ever retried into
success.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as replaced

import aiofiles.os  # noqa: F401  storage imports it when it writes, which would make the first save wait for it

from asyncckpt import formats, jsontree
from asyncckpt.codecs.digests import get as get_digest
from asyncckpt.codecs.digests import second as second_digest
from asyncckpt.commit.publication import publish
from asyncckpt.commit.publisher import Publisher
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointDamaged,
    NotEnoughSpace,
    SaveAbandoned,
    SaveFailed,
    UnsupportedValue,
)
from asyncckpt.events import Event, EventBus, Written
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.draft import Contents, components_json, state_json
from asyncckpt.manifest.json import MAX_STATE_BYTES
from asyncckpt.manifest.parts import Parts
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.memory.arena import Arena
from asyncckpt.protocols import PendingDirectory, SpaceReserver, Store
from asyncckpt.scope import SaveScope
from asyncckpt.storage.lease import run_is_gone
from asyncckpt.types import Layout
from asyncckpt.write.directory import SaveDirectory
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.progress import progress_of
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.shards import ShardPipeline
from asyncckpt.write.threads import Pools
from asyncckpt.write.unchanged import Unchanged

log = logging.getLogger("asyncckpt")

_WAY_OUT = "Check the storage, then save again"
_WAYS_OUT = {
    errno.EFBIG: "Files may not grow that large here: raise the limit (ulimit -f), or save with a smaller shard_bytes",
    errno.EMFILE: "This process has too many files open: raise the limit (ulimit -n), or close some",
    errno.ENFILE: "This machine has too many files open: raise the limit (sysctl fs.file-max), or close some",
    errno.EROFS: "The file system is read-only, which it may have become by an error: check it, remount it, save again",
}

#: Whoever deletes a run may have come to this save's directory first: so long it is looked whether the run goes, too.
_DELETION_SECONDS = 0.3


class SaveTransaction:
    """One attempt to write one checkpoint. Thread-safe: extents arrive from staging, are written by the pool, and
    ``commit`` runs on the committer's thread.

    ``scope``: made by whoever makes the save; nothing is published once it has failed. ``space``: makes room for the
    save. ``source``: the checkpoint that unchanged files are taken over from, None for none. ``chain``: how often in a
    row a file may be saved as differences. ``started_seconds``: when the save was asked for, by ``time.perf_counter``.
    """

    def __init__(
        self,
        contents: Contents,
        scope: SaveScope,
        publisher: Publisher,
        *,
        store: Store,
        space: SpaceReserver,
        source: ReuseSource | None,
        chain: int,
        pools: Pools,
        arena: Arena,
        encoder: Encoder,
        events: EventBus,
        started_seconds: float,
    ) -> None:
        self.contents = contents
        self.scope = scope
        self.step = scope.step
        self.started_seconds = self.written_seconds = started_seconds
        self._publisher = publisher
        self._space = space
        self._timeout_seconds = 0.0
        self._events = events
        self._codec = encoder.codec
        draft = contents.draft
        self.digest = get_digest(draft.digest)
        self._format = formats.get(draft.shard_format)
        shards = progress_of(contents.layout)
        self._unchanged = Unchanged(
            shards,
            scope=scope,
            source=source,
            kind=draft.kind,
            codec=encoder.codec,
            digest=self.digest,
            second=second_digest(draft.digest),
            chain=chain,
            arena=arena,
        )
        self._directory = SaveDirectory(
            store,
            scope,
            space,
            self._unchanged,
            name=draft.name,
            attempt=draft.attempt,
            shared=draft.world_size > 1,
            beside_bytes=sum(map(len, contents.assets.values())) + _bytes_of_others(contents.layout),
        )
        self.shards = ShardPipeline(
            contents.layout,
            scope=scope,
            shards=shards,
            unchanged=self._unchanged,
            directory=self._directory,
            shard_format=self._format,
            digest=self.digest,
            encoder=encoder,
            pools=pools,
            arena=arena,
            events=events,
        )

    def written_bytes(self, written: Manifest) -> int:
        """Return how many bytes of a durable checkpoint were written, in a job by this rank."""
        return self._publisher.written_bytes(self, written)

    def descend_from(self, attempt: str) -> None:
        """Record which checkpoint training came from, once the saves before this one have ended. Call it before
        ``commit``, on the same thread."""
        self.contents = replaced(self.contents, draft=replaced(self.contents.draft, parent=attempt))

    def commit(
        self,
        check_lease: Callable[[], None],
        timeout_seconds: float,
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest:
        """Wait for the shards, then publish. Blocks; the returned manifest is durable.

        Raises what made the save fail, as ``SaveFailed`` or another of this library's errors.
        """
        try:
            directory = self._directory.open()
            early = self._publisher.prepare(self, directory)
            self._timeout_seconds = timeout_seconds
            self.wait_written()
            now = self.written_seconds = time.perf_counter()
            nbytes = self.contents.layout.nbytes
            self._events.emit(
                Written(step=self.step, at_seconds=now, nbytes=nbytes, seconds=now - self.started_seconds)
            )
            return self._publisher.publish(self, directory, early, check_lease, read_back)
        except BaseException as error:
            self.scope.fail(error)
            typed = self.typed(error)
            raised = self._publisher.failed(self, typed)
            self.discard(0.2)
            if raised is error:
                raise
            raise raised from (error if raised is typed else typed)

    def publish(
        self,
        directory: PendingDirectory,
        contents: Contents,
        records: Sequence[FileRecord],
        orders: Mapping[str, Sequence[int]],
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[PendingDirectory], None] | None,
        parts: Parts | None = None,
    ) -> Manifest:
        """Make a checkpoint of what is written, once all data is on the disk. Called by publishers. Blocks on the disk.
        ``small``: the files beside the shards, which are durable too. ``orders``: by file, which of its extents each
        extent of the layout is. ``parts``: those of the manifest that ranks have written, and the files they list."""

        def before() -> None:
            self.scope.raise_if_failed()
            check_lease()
            self.scope.begin_publish()

        beside = [manifest.whole_file(name, data, self.digest) for name, data in small.items()]
        return publish(
            directory,
            replaced(
                contents.draft,
                files=(*records, *beside, *(parts.files() if parts is not None else ())),
                parts=parts,
                least_version=manifest.version_of_values(small.get(manifest.STATE_FILE, b""), contents.draft.config),
            ),
            components_json=components_json(contents, orders),
            known=contents.layout.cache,
            replace=contents.replace,
            before=before,
            read_back=read_back,
        )

    def typed(self, error: BaseException) -> BaseException:
        """Return the error of this library that says what an error of the storage means for this save. May look at the
        disk."""
        # rank 0 of a job deletes attempts; a checkpoint that files were to be taken over from goes with its run, too
        patience_seconds = _DELETION_SECONDS if self.contents.draft.world_size == 1 else 0.0
        missing = isinstance(error, FileNotFoundError | CheckpointDamaged)
        if missing and self._directory.run_is_gone(patience_seconds):
            return run_is_gone(self._directory.run)
        if isinstance(error, AsyncCkptError) or not isinstance(error, Exception):
            return error
        path = self._directory.path
        code = error.errno if isinstance(error, OSError) else None
        if isinstance(error, OSError) and code in (errno.ENOSPC, errno.EDQUOT):
            return NotEnoughSpace(
                f"step {self.step}: {path} ran out of space ({error.strerror}). Nothing was published and the attempt "
                f"was removed; free space (or inodes), or keep fewer checkpoints"
            )
        return SaveFailed(
            f"step {self.step}: writing {path} failed: {type(error).__name__}: {error}. Nothing was published; "
            f"earlier checkpoints are untouched. {_WAYS_OUT.get(code or 0, _WAY_OUT)}"
        )

    def emit(self, event: Event) -> None:
        """Tell subscribers of something that happened to this save. Called by publishers. Never blocks."""
        self._events.emit(event)

    def make_room(self, nbytes: int) -> None:
        """Make sure that so many more bytes fit. Called by publishers. Blocks on the disk. Raises
        ``NotEnoughSpace``."""
        self._space.make_room(nbytes, self.step)

    def wait_written(self) -> None:
        """Wait until the shards are durable. Called by publishers, where some were to be written after all. Raises what
        made the save fail, and ``SaveAbandoned`` once its time is over."""
        timeout_seconds = self._timeout_seconds
        remaining = self.started_seconds + timeout_seconds - time.perf_counter()
        done = self.scope.wait_until(lambda: not self.shards.unfinished and self.scope.judged, remaining)
        self.scope.raise_if_failed()
        if not done:
            raise SaveAbandoned(
                f"step {self.step}: not durable after {timeout_seconds:.0f} s; the save was given up so that "
                f"training goes on. Check the storage under {self._directory.path}"
            )

    def write_small(self, directory: PendingDirectory, contents: Contents, *, state: bool = True) -> dict[str, bytes]:
        """Write the files beside the shards of these contents, durably; return what is in them, by name. Called by
        publishers. ``state``: write ``state.json``, the files of the root and the assets, too."""
        small = {manifest.STATE_FILE: _state_file(contents, self.step)} if state else {}
        for component in contents.kinds:
            shards = [shard for shard in contents.layout.shards if shard.component == component]
            if shards:
                small |= self._format.small_files(component, shards, self._codec)
        if state:
            small |= self._root_files(contents) | dict(contents.assets)
        directory.write_small(small)
        return small

    def _root_files(self, contents: Contents) -> dict[str, bytes]:
        """Return the files of the checkpoint's root, which the layout keeps: they are the same at every save of it."""
        component = _indexed(contents.kinds)
        key = component, dict(contents.assets)
        kept = contents.layout.cache.get("root files")
        if kept is None or kept[0] != key:
            shards = () if contents.layout.of_rank else contents.layout.shards  # an index lists those of all ranks
            indexed = [shard for shard in shards if shard.component == component]
            kept = contents.layout.cache["root files"] = (key, self._format.root_files(indexed, contents.assets))
        files: dict[str, bytes] = kept[1]
        return dict(files)

    def discard(self, timeout_seconds: float) -> bool:
        """Remove a failed attempt, once none of its writes is in the kernel. Returns False where one still is after
        ``timeout_seconds`` (hung storage): call it again, or leave that to the next run. Idempotent; never raises."""
        deadline = time.monotonic() + timeout_seconds
        if not self.scope.wait_until(lambda: self.shards.in_flight == 0, timeout_seconds, failed_too=False):
            return False
        if self.scope.error is not None:  # the others are told why before their files are gone
            self._publisher.failed(self, self.typed(self.scope.error))
        return self._directory.discard(deadline - time.monotonic(), keep=self._publisher.keeps_files)

    def close(self) -> None:
        """Close the checkpoint that files were taken over from. Call it once the save has ended, whichever way.
        Idempotent."""
        self._unchanged.close()
        self.scope.end()


def _indexed(kinds: Mapping[str, str]) -> str | None:
    """Return the component that the index lists, as loaders refuse a directory with two: ``model``, or the only
    module."""
    modules = [name for name, kind in kinds.items() if kind == "module"]
    if "model" in kinds:
        return "model"
    return modules[0] if len(modules) == 1 else None


def _bytes_of_others(layout: Layout) -> int:
    """Return the size of what other ranks write into files of their own, which this rank's shards do not show."""
    return max(0, layout.nbytes - sum(shard.nbytes for shard in layout.shards)) if layout.of_rank else 0


def _state_file(contents: Contents, step: int) -> bytes:
    """Return the bytes of ``state.json``. Raises ``UnsupportedValue`` where they are more than a reader takes."""
    data = state_json(contents)
    if len(data) > MAX_STATE_BYTES:
        sizes = {name: len(jsontree.dumps(tree)) for name, tree in contents.trees.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise UnsupportedValue(
            f"step {step}: the plain values of the state take {len(data)} bytes in {manifest.STATE_FILE}, and readers "
            f"take up to {MAX_STATE_BYTES}; {sizes[largest]} of them are in {largest!r}. Nothing was published: keep "
            f"long lists as tensors or numpy arrays, which are stored in files of their own"
        )
    return data
