"""From staged extents to a published checkpoint.

Order (docs/format.md, "Write ordering"): shards written and fsynced → small files → directory fsynced → manifest, last,
fsynced → directory fsynced → rename, never over anything → parent fsynced → only then acknowledged. Digests are taken
from the staged bytes before they are written. Any error poisons the attempt; nothing is ever retried into success.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as replaced

import aiofiles.os  # noqa: F401  storage imports it when it writes, which would make the first save wait for it

from asyncckpt import formats, jsontree
from asyncckpt.codecs.digests import get as get_digest
from asyncckpt.codecs.digests import second as second_digest
from asyncckpt.errors import AsyncCkptError, NotEnoughSpace, SaveAbandoned, SaveFailed
from asyncckpt.events import EventBus, Written
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.draft import Contents, _components_json
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.memory.arena import Arena, Slot
from asyncckpt.protocols import Attempt, Store
from asyncckpt.stage.job import Ready
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.reuse import Previous
from asyncckpt.write.shards import ShardsWriting
from asyncckpt.write.threads import Pools

log = logging.getLogger("asyncckpt")

#: What a checkpoint needs on disk beyond its tensors, for the space estimate.
_SMALL_FILES_BYTES = 4 << 20
_WAY_OUT = "Check the storage, then save again"
_WAYS_OUT = {
    errno.EFBIG: "Files may not grow that large here: raise the limit (ulimit -f), or save with a smaller shard_bytes",
    errno.EMFILE: "This process has too many files open: raise the limit (ulimit -n), or close some",
    errno.ENFILE: "This machine has too many files open: raise the limit (sysctl fs.file-max), or close some",
    errno.EROFS: "The file system is read-only, which it may have become by an error: check it, remount it, save again",
}


class Save:
    """One attempt to write one checkpoint. Thread-safe: extents arrive from staging, are written by the pool, and
    ``commit`` runs on the committer's thread."""

    def __init__(
        self,
        contents: Contents,
        *,
        store: Store,
        pools: Pools,
        arena: Arena,
        encoder: Encoder,
        previous: Callable[[], Previous | None],
        chain: int,
        events: EventBus,
        make_room: Callable[[int], None],
        started_seconds: float,
    ) -> None:
        self.contents = contents
        self.step = contents.draft.step
        self.started_seconds = self.written_seconds = started_seconds
        self._store = store
        self._events = events
        self._make_room = make_room
        self._codec = encoder.codec
        #: Told of the first error, so that staging stops too. Set before the first extent is taken.
        self.on_error: Callable[[BaseException], None] = lambda _error: None
        self.digest = get_digest(contents.draft.digest)
        self._attempt: Attempt | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._start_lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._format = formats.get(contents.draft.shard_format)
        self.shards = ShardsWriting(
            contents.layout,
            step=self.step,
            shard_format=self._format,
            digest=self.digest,
            second=second_digest(contents.draft.digest),
            encoder=encoder,
            previous=previous,
            chain=chain,
            pools=pools,
            arena=arena,
            events=events,
            start=self._start,
            fail=self.fail,
            failed=lambda: self._error is not None,
            changed=self._notify,
        )

    @property
    def error(self) -> BaseException | None:
        """What poisoned the attempt, or None."""
        return self._error

    def take(self, number: int, slot: Slot, ready: Ready, digest: str | None) -> None:
        """Accept a staged extent, with its content digest where it was taken already. Never blocks."""
        self.shards.take(number, slot, ready, digest)

    def written_bytes(self, written: Manifest) -> int:
        """What went to the disk of a durable checkpoint; in a job, from this rank."""
        return written.nbytes - self.shards.linked_bytes()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Poison the attempt: nothing of it will be published. The first error is kept. Idempotent."""
        with self._changed:
            if self._error is not None:
                return
            self._error = error
            self._changed.notify_all()
        self.shards.abandon()
        self.on_error(error)

    def commit(
        self,
        check_lease: Callable[[], None],
        timeout_seconds: float,
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        """Wait for the shards, then publish. Blocks; the returned manifest is durable.

        Raises what poisoned the attempt, as ``SaveFailed`` or another of this library's errors.
        """
        try:
            attempt = self._start()
            early = self._meanwhile(attempt)
            self._wait_written(timeout_seconds)
            now = self.written_seconds = time.perf_counter()
            nbytes = self.contents.layout.nbytes
            self._events.emit(
                Written(step=self.step, at_seconds=now, nbytes=nbytes, seconds=now - self.started_seconds)
            )
            return self._conclude(attempt, early, check_lease, read_back)
        except BaseException as error:
            self.fail(error)
            self.discard(0.2)
            typed = self._typed(error)
            if typed is error:
                raise
            raise typed from error

    def _meanwhile(self, attempt: Attempt) -> dict[str, bytes]:
        """What can be done while the shards are still being written: the small files."""
        return self._write_small(attempt, self.contents)

    def _conclude(
        self,
        attempt: Attempt,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        """All data is on the disk: manifest and publication."""
        return self._publish(
            attempt, self.contents, self.shards.records(), self.shards.orders(), small, check_lease, read_back
        )

    def _publish(
        self,
        attempt: Attempt,
        contents: Contents,
        records: Sequence[FileRecord],
        orders: Mapping[str, Sequence[int]],
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        written = self._write_manifest(attempt, contents, records, orders, small)
        if read_back is not None:
            read_back(attempt.path)
        if self._error is not None:
            raise self._error
        check_lease()
        attempt.publish(written.name, replace=contents.replace)
        return written

    def _typed(self, error: BaseException) -> BaseException:
        if isinstance(error, AsyncCkptError) or not isinstance(error, Exception):
            return error
        path = self._attempt.path if self._attempt else getattr(self._store, "path", "the run directory")
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

    def _start(self) -> Attempt:
        """The attempt's directory, made by whichever thread comes first."""
        with self._start_lock:
            if self._attempt is None:
                if self._error is not None:
                    raise self._error
                self._make_room(self._needed_bytes() + _SMALL_FILES_BYTES)
                self._attempt = self._store.begin(
                    self.step, self.contents.draft.attempt, shared=self.contents.draft.world_size > 1
                )
            return self._attempt

    def _needed_bytes(self) -> int:
        return self.shards.expected_bytes()

    def _wait_written(self, timeout_seconds: float) -> None:
        deadline = self.started_seconds + timeout_seconds
        with self._changed:
            while self.shards.unfinished and self._error is None:
                remaining = deadline - time.perf_counter()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
            if self._error is not None:
                raise self._error
            if self.shards.unfinished:
                raise SaveAbandoned(
                    f"step {self.step}: not durable after {timeout_seconds:.0f} s; the save was given up so that "
                    f"training goes on. Check the storage under {getattr(self._store, 'path', 'the run')}"
                )

    def _write_small(self, attempt: Attempt, contents: Contents, *, state: bool = True) -> dict[str, bytes]:
        small = {manifest.STATE_FILE: jsontree.dumps(contents.trees)} if state else {}
        for component in contents.kinds:
            shards = [shard for shard in contents.layout.shards if shard.component == component]
            if shards:
                small |= self._format.small_files(component, shards, self._codec)
        asyncio.run(attempt.write_small(small))
        return small

    def _write_manifest(
        self,
        attempt: Attempt,
        contents: Contents,
        records: Sequence[FileRecord],
        orders: Mapping[str, Sequence[int]],
        small: Mapping[str, bytes],
    ) -> Manifest:
        attempt.sync_directory()
        files = [
            *records,
            *(manifest.whole_file(name, data, self.digest) for name, data in small.items()),
        ]
        draft = replaced(contents.draft, files=tuple(files))
        data = manifest.encode(draft, components_json=_components_json(contents, orders))
        asyncio.run(attempt.write_small({manifest.FILE_NAME: data}))
        attempt.sync_directory()
        return replaced(draft, size_bytes=len(data), file_digest=manifest.file_digest(data))

    def discard(self, timeout_seconds: float, *, keep: bool = False) -> bool:
        """Remove a failed attempt, once no write of it is in the kernel; False where one still is after
        ``timeout_seconds`` (hung storage): to be called again, or left to the next run. ``keep``: only close its files.
        Idempotent; never raises."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            if not self._changed.wait_for(lambda: self.shards.in_flight == 0, timeout_seconds):
                return False
        if not self._start_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        attempt = self._attempt  # nobody can create files from here on: the error is set
        self._start_lock.release()
        if attempt is not None and keep:
            attempt.close()
        elif attempt is not None:
            attempt.discard()
        return True
