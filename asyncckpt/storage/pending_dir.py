"""An unpublished checkpoint lies in a directory of its own: its files are written there, synced, and renamed at
last."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from asyncckpt.errors import CheckpointDamaged, DurabilityUnknown, SaveFailed, StepExists
from asyncckpt.protocols import Reader, ShardWriter
from asyncckpt.storage.posix import NO_FLAGS, NO_LINK, NO_REFLINK
from asyncckpt.storage.reader import LocalReader
from asyncckpt.storage.shard_file import LocalShardWriter

if TYPE_CHECKING:
    from asyncckpt.storage.local import LocalStore


log = logging.getLogger("asyncckpt")

#: Small files written at one time: each holds a descriptor and a thread.
_SMALL_AT_ONCE = 64
#: Directories synced at one time, by further threads where there are many (zarr has one a tensor).
_SYNCS_AT_ONCE = 8
_SYNCS_A_THREAD = 16


class LocalPendingDirectory:
    """Writes one ``.tmp-…`` directory and gives it its name. Thread-safe. See ``protocols`` for what its methods
    promise."""

    def __init__(self, store: LocalStore, path: str, step: int, attempt: str) -> None:
        self.uuid = attempt
        self.path = path
        self._store = store
        self._step = step
        self._writers: list[LocalShardWriter] = []
        self._folders = {""}
        self._unsynced = {""}
        self._lock = threading.Lock()
        self._done = False

    def create_shard(self, file: str, nbytes: int, *, shared: bool = False) -> ShardWriter:
        self._make_folder(file)
        writer = LocalShardWriter(self._store, os.path.join(self.path, file), nbytes, shared=shared)
        with self._lock:
            self._writers.append(writer)
        return writer

    def link(self, source: Reader, file: str, nbytes: int, name: str) -> bool:
        """Make a reflink where the file system has them (a file of its own that shares the blocks), or else a hard
        link."""
        store, ops = self._store, self._store.ops
        old, new = os.path.join(source.path, file), os.path.join(self.path, name)
        if source.files_nbytes(file) != nbytes:
            raise CheckpointDamaged(f"{old} has another size than the {nbytes} bytes it was written with")
        self._make_folder(name)
        if store.reflinks:
            try:
                ops.reflink(old, new)
                return True
            except OSError as error:
                if error.errno not in NO_REFLINK:
                    raise
                store.reflinks = False
                with contextlib.suppress(FileNotFoundError):
                    ops.unlink(new)
        if store.links:
            try:
                ops.link(old, new)
                return True
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                store.links = error.errno == errno.EMLINK
        return False

    def write_small(self, files: Mapping[str, bytes]) -> None:
        """Write small files. Those of equal content, such as the metadata of equal arrays, become one file of several
        names where the file system can do that."""
        import asyncio  # reading has no use for it

        asyncio.run(self._write_small(files))

    async def _write_small(self, files: Mapping[str, bytes]) -> None:
        import asyncio

        ops = self._store.ops
        first: dict[bytes, str] = {}
        twins: list[tuple[str, str]] = []
        for name, data in files.items():
            self._make_folder(name)
            if (known := first.setdefault(data, name)) != name:
                twins.append((known, name))
        originals = [(os.path.join(self.path, name), data) for data, name in first.items()]
        for start in range(0, len(originals), _SMALL_AT_ONCE):
            together = (ops.write_file(*item) for item in originals[start : start + _SMALL_AT_ONCE])
            # all of them end, whatever fails: one that was cancelled while it opens its file would leave that open
            for outcome in await asyncio.gather(*together, return_exceptions=True):
                if outcome is not None:
                    raise outcome
        for known, name in twins:
            target = os.path.join(self.path, name)
            try:
                ops.link(os.path.join(self.path, known), target)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                await ops.write_file(target, files[name])

    def sync_directory(self) -> None:
        with self._lock:
            folders, self._unsynced = self._unsynced, set()
        todo = deque(sorted(folders, reverse=True))
        errors: list[BaseException] = []

        def work() -> None:
            with contextlib.suppress(IndexError):
                while not errors:
                    folder = todo.popleft()
                    try:
                        self._store.ops.fsync_directory(os.path.join(self.path, folder) if folder else self.path)
                    except BaseException as error:
                        errors.append(error)

        # each waits for the device, which does several at a time; nothing here depends on their order
        others = min(_SYNCS_AT_ONCE, len(todo) // _SYNCS_A_THREAD)
        threads = [threading.Thread(target=work, name="asyncckpt-sync", daemon=True) for _ in range(others)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _make_folder(self, file: str) -> None:
        """Make the directories in a file's name. Each is made once, by whichever thread comes first."""
        folder = os.path.dirname(file)
        with self._lock:
            self._unsynced.add(folder)
            missing: list[str] = []
            while folder not in self._folders:
                missing.append(folder)
                folder = os.path.dirname(folder)
        for new in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another thread came first: the attempt is ours alone
                self._store.ops.mkdir(os.path.join(self.path, new))
            with self._lock:
                self._folders.add(new)
                self._unsynced.update((new, os.path.dirname(new)))

    def open(self) -> LocalReader:
        store = self._store
        return LocalReader(store.path, os.path.basename(self.path), ops=store.ops, direct=store.direct)

    def publish(self, name: str, *, replace: bool) -> None:
        ops, parent = self._store.ops, self._store.path
        target = os.path.join(parent, name)
        ours = os.lstat(self.path).st_ino
        with contextlib.suppress(OSError):  # an empty directory is no checkpoint: it makes room
            if not os.listdir(target):
                ops.rmdir(target)
        # where one is there, it stays visible until the new one takes its name in the same instant
        exchanged = replace and os.path.lexists(target)
        try:
            if exchanged:
                ops.exchange(self.path, target)
            else:
                ops.rename_noreplace(self.path, target)
            ops.fsync_directory(parent)
        except OSError as error:
            if self._withdraw(target, ours, error, exchanged=exchanged):
                raise
            if isinstance(error, FileExistsError):
                raise StepExists(
                    f"{target} already exists; it was left as it is (step {self._step}). Save another step, or pass "
                    f"run=RunOptions(overwrite=True)"
                ) from error
            if exchanged and error.errno in NO_FLAGS:
                raise SaveFailed(
                    f"step {self._step}: the file system of {target} cannot exchange two names ({error}), and without "
                    f"that no checkpoint is replaced. Save another step, or move that one away first"
                ) from error
            if error.errno == errno.EXDEV:
                raise SaveFailed(f"{target} lies on another file system than {self.path}; both must be one") from error
            raise
        self._done = True
        if exchanged:
            self._store.throw_away(self.path, name)

    def _withdraw(self, target: str, ours: int, error: OSError, *, exchanged: bool) -> bool:
        """Take the name back after an error, and return whether there was one to take back. A checkpoint that may not
        outlive a power cut must be neither seen nor counted by retention. Raises ``DurabilityUnknown`` where that fails
        too."""
        ops = self._store.ops
        try:
            if os.lstat(target).st_ino != ours:
                return False
            if exchanged:
                ops.exchange(target, self.path)
            else:
                ops.rename_noreplace(target, self.path)
        except FileNotFoundError:
            return False
        except OSError as second:
            self._done = True  # our directory's name may hold what was there before: not for ``discard``
            raise DurabilityUnknown(
                f"step {self._step}: {target} is complete and has its name, but making that durable failed ({error}), "
                f"and so did taking it back ({second}): it may be gone after a power cut. Check the storage, save again"
            ) from error
        try:
            ops.fsync_directory(self._store.path)
        except OSError as second:  # nobody knows which of the two names the disk has: neither may be deleted
            self._done = True
            log.warning("%s is left for the next run to delete: %s", self.path, second)
        return True

    def close(self) -> None:
        for writer in self._writers:
            writer.abort()

    def discard(self) -> None:
        self.close()
        if not self._done:
            self._done = True
            self._store.delete_tree(self.path)
