"""A run directory on a local or network file system.

Names: a checkpoint is a plain directory; ``.tmp-<step>-<uuid>`` is an unpublished attempt, ``.trash-…`` is being
deleted, ``.damaged-…`` was set aside. All of ours start with a dot, so that no framework takes them for checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import uuid
from collections.abc import Mapping

from asyncckpt.errors import (
    CheckpointDamaged,
    RunPathError,
    SaveFailed,
    StepExists,
)
from asyncckpt.protocols import ALIGNMENT_BYTES, Attempt, Reader, ShardWriter
from asyncckpt.storage.posix import NO_DIRECT, NO_LINK, NO_REFLINK, PosixOps
from asyncckpt.storage.reader import MANIFEST_FILE, LocalReader

log = logging.getLogger("asyncckpt")

TEMP_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
DAMAGED_PREFIX = ".damaged-"
#: Answers that mean "that directory is not yours to sync", of one that was there before.
_NO_SYNC = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL})
#: Shards up to this size go through the page cache.
_SMALL_BYTES = 256 << 10
#: Small files written at one time: each holds a descriptor and a thread.
_SMALL_AT_ONCE = 64


class LocalStore:
    """Thread-safe. Blocks on the device. ``direct=False`` goes through the page cache (and is used by itself where
    the file system has no O_DIRECT)."""

    path: str

    def __init__(self, path: str, *, ops: PosixOps | None = None, direct: bool = True) -> None:
        self.path = path
        self.ops = ops or PosixOps()
        self.direct = direct and hasattr(os, "O_DIRECT")
        #: Whether the file system shares blocks between files, and files between names: found out by trying.
        self.reflinks = self.links = True

    def prepare(self, *, create_parents: bool = False) -> None:
        """Make the run directory usable for writing. Raises ``RunPathError`` with the way out."""
        parent = os.path.dirname(os.path.abspath(self.path))
        try:
            if not create_parents and not os.path.isdir(parent):
                raise RunPathError(
                    f"{self.path}: the parent directory {parent} does not exist. Create it, mount its file system, "
                    f"or pass create_parents=True"
                )
            self._make_durable(os.path.abspath(self.path))
            if not os.path.isdir(self.path):
                raise RunPathError(f"{self.path} is a file; a run needs a directory. Choose another path")
            probe = os.path.join(self.path, f"{TEMP_PREFIX}probe-{uuid.uuid4().hex}")
            self.ops.mkdir(probe)
            self.ops.rmdir(probe)
        except RunPathError:
            raise
        except OSError as error:
            hint = {
                errno.EROFS: "the file system is read-only; remount it or choose another path",
                errno.EACCES: "no permission to write there; change its mode or owner, or choose another path",
                errno.EPERM: "no permission to write there; change its mode or owner, or choose another path",
                errno.ENOSPC: "no space or no inodes left; free some, or choose another path",
                errno.ENOTDIR: "a part of the path is a file; choose another path",
            }.get(error.errno or 0, "choose another path, or repair this one")
            raise RunPathError(f"{self.path}: cannot write here ({error}): {hint}") from error

    def _make_durable(self, path: str) -> None:
        """Make a directory and the parents it lacks. The deepest that is there already is synced too: whoever made it
        may have died before its name was durable."""
        missing: list[str] = []
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        try:
            self.ops.fsync_directory(os.path.dirname(path))
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        for made in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self.ops.mkdir(made)
            self.ops.fsync_directory(os.path.dirname(made))

    def begin(self, step: int, attempt: str) -> Attempt:
        path = os.path.join(self.path, f"{TEMP_PREFIX}{step:08d}-{attempt}")
        self.ops.mkdir(path)  # fails where it exists: an attempt's directory is never reused
        return LocalAttempt(self, path, step, attempt)

    def free_bytes(self) -> int:
        return self.ops.free_bytes(self.path)

    def names(self) -> list[str]:
        try:
            entries = self.ops.scan(self.path)
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            raise RunPathError(f"{self.path} is a file, not a run directory") from error
        return [name for name, info in entries.items() if not name.startswith(".") and stat.S_ISDIR(info.st_mode)]

    def identity(self, name: str) -> int | None:
        try:
            return self.ops.lstat(os.path.join(self.path, name)).st_ino
        except FileNotFoundError:
            return None

    def listing(self, name: str) -> Mapping[str, os.stat_result]:
        try:
            return self.ops.scan(os.path.join(self.path, name))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def open(self, name: str) -> Reader:
        return LocalReader(self.path, name, ops=self.ops, direct=self.direct)

    def open_attempt(self, path: str) -> Reader:
        """Read an unpublished attempt of this process, for reading back what was written."""
        return LocalReader(self.path, os.path.basename(path), ops=self.ops, direct=self.direct)

    def remove(self, name: str) -> bool:
        source = os.path.join(self.path, name)
        guard = _try_exclusive(os.path.join(source, MANIFEST_FILE))
        if guard is None:
            return False
        try:
            trash = os.path.join(self.path, f"{TRASH_PREFIX}{name}-{uuid.uuid4().hex}")
            self.ops.rename_noreplace(source, trash)
        finally:
            if guard >= 0:
                os.close(guard)
        # a power loss could keep the deletions and forget the rename: half a checkpoint, under its own name
        self.ops.fsync_directory(self.path)
        self.delete_tree(trash)
        return True

    def set_aside(self, name: str) -> str:
        target = f"{DAMAGED_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
        self.ops.rename_noreplace(os.path.join(self.path, name), os.path.join(self.path, target))
        self.ops.fsync_directory(self.path)
        return target

    def reclaim(self) -> list[str]:
        """Delete what dead attempts and interrupted deletions left behind; the names. Only while holding the run's
        lease: holding it means that whoever made them is gone or cut off.

        What is visible is made durable first: the run before may have died between a rename and its sync, and from now
        on retention counts on what it sees."""
        self.ops.fsync_directory(self.path)
        found = {
            name: info
            for name, info in self.ops.scan(self.path).items()
            if name.startswith((TEMP_PREFIX, TRASH_PREFIX))
        }
        for name, info in found.items():
            path = os.path.join(self.path, name)
            if stat.S_ISDIR(info.st_mode):
                self.delete_tree(path)
            elif stat.S_ISREG(info.st_mode):
                with contextlib.suppress(FileNotFoundError):
                    self.ops.unlink(path)
        return list(found)

    def write_hint(self, name: str, text: str) -> None:
        """Replace a small hint file such as ``latest``. Atomic; not fsynced: a hint is never truth."""
        temp = os.path.join(self.path, f"{TEMP_PREFIX}{name}-{uuid.uuid4().hex}")
        fd = self.ops.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            self.ops.pwrite(fd, text.encode(), 0)
        finally:
            self.ops.close(fd)
        self.ops.replace(temp, os.path.join(self.path, name))

    def delete_tree(self, path: str) -> None:
        """Delete one of our own directories; entries that others hold (``.nfs*``) or that vanish are tolerated."""
        try:
            for name, info in self.ops.scan(path).items():
                child = os.path.join(path, name)
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISDIR(info.st_mode):
                        self.delete_tree(child)
                    else:
                        self.ops.unlink(child)
            self.ops.rmdir(path)
        except OSError as error:
            log.warning("could not delete %s: %s (the next run tries again)", path, error)


class LocalAttempt:
    """One ``.tmp-…`` directory on its way to a name."""

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

    def create_shard(self, file: str, nbytes: int) -> ShardWriter:
        self._make_folder(file)
        writer = LocalShardWriter(self._store, os.path.join(self.path, file), nbytes)
        with self._lock:
            self._writers.append(writer)
        return writer

    def link(self, source: Reader, file: str, nbytes: int, name: str) -> bool:
        """A reflink where the file system has them (a file of its own that shares the blocks), or else a hard link."""
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

    async def write_small(self, files: Mapping[str, bytes]) -> None:
        """Files of equal content are one file of several names, where the file system can: metadata of equal arrays."""
        ops = self._store.ops
        first: dict[bytes, str] = {}
        twins: list[tuple[str, str]] = []
        for name, data in files.items():
            self._make_folder(name)
            if (known := first.setdefault(data, name)) != name:
                twins.append((known, name))
        originals = [(os.path.join(self.path, name), data) for data, name in first.items()]
        for start in range(0, len(originals), _SMALL_AT_ONCE):
            await asyncio.gather(*(ops.write_file(*item) for item in originals[start : start + _SMALL_AT_ONCE]))
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
        for folder in sorted(folders, reverse=True):  # children first
            self._store.ops.fsync_directory(os.path.join(self.path, folder) if folder else self.path)

    def _make_folder(self, file: str) -> None:
        """The directories of a file's name; each is made once, by whichever thread comes first."""
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

    def publish(self, name: str, *, replace: bool) -> None:
        ops = self._store.ops
        target = os.path.join(self._store.path, name)
        try:
            if replace and os.path.lexists(target):
                # the old checkpoint stays visible until the new one takes its name in the same instant
                ops.exchange(self.path, target)
                self._done = True  # from here on our directory's name holds the old one: not for ``discard``
                ops.fsync_directory(self._store.path)
                self._store.delete_tree(self.path)
                return
            ops.rename_noreplace(self.path, target)
        except FileExistsError as error:
            raise StepExists(
                f"{target} already exists; it was left as it is (step {self._step}). Save another step, or pass "
                f"overwrite=True"
            ) from error
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise SaveFailed(f"{target} lies on another file system than {self.path}; both must be one") from error
            raise
        self._done = True
        ops.fsync_directory(self._store.path)

    def discard(self) -> None:
        for writer in self._writers:
            writer.abort()
        if not self._done:
            self._done = True
            self._store.delete_tree(self.path)


class LocalShardWriter:
    """A shard file. Aligned extents go past the page cache; an unaligned tail is padded and cut off again."""

    def __init__(self, store: LocalStore, path: str, nbytes: int) -> None:
        self.path = path
        self._ops = store.ops
        self._lock = threading.Lock()
        self._in_flight = 0
        self._aborted = False
        self._end = 0
        # a small file is one buffered write and its fsync: everything else costs more than its bytes
        self._small = nbytes <= _SMALL_BYTES
        self._direct = store.direct and not self._small
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._fd = -1
        if self._direct:
            try:
                self._fd = self._ops.open(path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in NO_DIRECT:
                    raise
                store.direct = self._direct = False
                with contextlib.suppress(FileNotFoundError):
                    self._ops.unlink(path)  # some file systems create the name before they refuse the flag
        if self._fd < 0:
            self._fd = self._ops.open(path, flags)
        if self._small:
            return
        try:
            self._ops.reserve(self._fd, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.abort()
                raise
            # reserving is a courtesy: a file system without it (NFSv3, tmpfs variants) still writes

    def write_at(self, view: memoryview, nbytes: int, offset: int) -> None:
        with self._lock:
            if self._fd < 0 or self._aborted:
                raise SaveFailed(f"{self.path}: written to after the attempt was given up")
            self._in_flight += 1
        try:
            if self._direct:
                padded = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                try:
                    self._write(view[:padded], offset)
                    return
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                self._leave_direct()
            self._write(view[:nbytes], offset)
        finally:
            self._end_write()

    def finish(self, nbytes: int) -> None:
        if not self._small or self._end != nbytes:
            self._ops.truncate(self._fd, nbytes)
        self._ops.fsync(self._fd)
        fd, self._fd = self._fd, -1
        self._ops.close(fd)

    def abort(self) -> None:
        # A descriptor closed under a write that is still in the kernel could be reused by another file, and the rest
        # of that write would land there: the last write closes it.
        with self._lock:
            self._aborted = True
            self._in_flight += 1
        self._end_write()

    def _end_write(self) -> None:
        with self._lock:
            self._in_flight -= 1
            if not self._aborted or self._in_flight or self._fd < 0:
                return
            fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            self._ops.close(fd)

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            if self._aborted:
                raise SaveFailed(f"{self.path}: the attempt was given up")
            written = self._ops.pwrite(self._fd, view, offset)
            if written <= 0:
                raise SaveFailed(errno.EIO, f"{self.path}: a write of {len(view)} bytes made no progress")
            view, offset = view[written:], offset + written
        with self._lock:
            self._end = max(self._end, offset)

    def _leave_direct(self) -> None:
        """The file system took the flag and refuses the transfer: go on through the page cache."""
        with self._lock:
            if self._direct:
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._direct = False


def _try_exclusive(path: str) -> int | None:
    """A descriptor that holds the file's exclusive lock; -1 where there is nothing to lock; None where it is taken."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:  # no locks on this file system
        os.close(fd)
        return -1
    return fd
