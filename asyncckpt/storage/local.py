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
    SaveUndecided,
    StepExists,
)
from asyncckpt.protocols import ALIGNMENT_BYTES, Attempt, Reader, ShardWriter
from asyncckpt.storage.posix import NO_DIRECT, NO_FLAGS, NO_LINK, NO_REFLINK, PosixOps
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

#: Bytes of blocks that are shared with other ranks, kept until the others are written.
_MAX_EDGES_BYTES = 16 << 20


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
            with contextlib.suppress(FileNotFoundError):  # a run that has just begun here tidied it up
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

    def begin(self, step: int, attempt: str, *, shared: bool = False) -> Attempt:
        path = os.path.join(self.path, f"{TEMP_PREFIX}{step:08d}-{attempt}")
        try:
            self.ops.mkdir(path)
        except FileExistsError:  # an attempt's directory is never reused, but by the ranks of that very attempt
            if not shared:
                raise
        except OSError:
            with contextlib.suppress(OSError):  # made all the same, and only the answer was lost?
                self.ops.rmdir(path)
            raise
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
        # NFS answers from what it remembers, for half a minute after another machine deleted that; opening the
        # directory has it ask
        with contextlib.suppress(OSError):
            self.ops.close_read(self.ops.open_to_read(self.path, os.O_RDONLY | os.O_DIRECTORY))
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
        lease: holding it means that whoever made them is gone or cut off. Raises ``RunPathError`` where the directory
        cannot be read or made durable."""
        try:
            # A trainer killed between its rename and the fsync left a name that only memory knows: it must be durable
            # before anything is deleted on the strength of it.
            self.ops.fsync_directory(self.path)
            entries = self.ops.scan(self.path)
        except OSError as error:
            raise RunPathError(f"{self.path}: cannot be read or synced ({error}); repair the path") from error
        found = {name: info for name, info in entries.items() if name.startswith((TEMP_PREFIX, TRASH_PREFIX))}
        for name, info in found.items():
            path = os.path.join(self.path, name)
            if stat.S_ISDIR(info.st_mode):
                self._reclaim_tree(name)
            elif stat.S_ISREG(info.st_mode):
                with contextlib.suppress(FileNotFoundError):
                    self.ops.unlink(path)
        return list(found)

    def _reclaim_tree(self, name: str) -> None:
        path = os.path.join(self.path, name)
        if name.startswith(TEMP_PREFIX):
            # A writer that was cut off after its last look at the lease may be about to publish this: it gets all of it
            # or, once it has another name, nothing.
            trash = os.path.join(self.path, f"{TRASH_PREFIX}{name[1:]}-{uuid.uuid4().hex}")
            try:
                self.ops.rename_noreplace(path, trash)
            except FileNotFoundError:
                return
            except OSError as error:
                log.warning("could not delete %s: %s (the next run tries again)", path, error)
                return
            path = trash
        self.delete_tree(path)

    def write_hint(self, name: str, text: str) -> None:
        """Replace a small hint file such as ``latest``. Atomic; not fsynced: a hint is never truth."""
        temp = os.path.join(self.path, f"{TEMP_PREFIX}{name}-{uuid.uuid4().hex}")
        try:
            fd = self.ops.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                view, offset = memoryview(text.encode()), 0
                while written := self.ops.pwrite(fd, view[offset:], offset) if offset < len(view) else 0:
                    offset += written
            finally:
                self.ops.close(fd)
            self.ops.replace(temp, os.path.join(self.path, name))
        except OSError:
            with contextlib.suppress(OSError):
                self.ops.unlink(temp)
            raise

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
        except FileNotFoundError:
            return  # another rank of the job came first
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

    def create_shard(self, file: str, nbytes: int, *, shared: bool = False) -> ShardWriter:
        self._make_folder(file)
        writer = LocalShardWriter(self._store, os.path.join(self.path, file), nbytes, shared=shared)
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
        ops, parent = self._store.ops, self._store.path
        target = os.path.join(parent, name)
        ours = os.lstat(self.path).st_ino
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
                    f"overwrite=True"
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
            self._store.delete_tree(self.path)

    def _withdraw(self, target: str, ours: int, error: OSError, *, exchanged: bool) -> bool:
        """Take the name back after an error: what may not outlive a power cut must not be seen, or counted by
        retention. Whether there was anything to take back. Raises ``SaveUndecided`` where that fails too."""
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
            raise SaveUndecided(
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


class LocalShardWriter:
    """A shard file. Aligned extents go past the page cache; an unaligned tail is padded and cut off again.

    ``shared``: others write into the file too. Blocks that may be theirs in part go through the page cache, byte for
    byte, by a descriptor of their own; the whole blocks between go past it.
    """

    def __init__(self, store: LocalStore, path: str, nbytes: int, *, shared: bool = False) -> None:
        self.path = path
        self._ops = store.ops
        self._lock = threading.Lock()
        self._in_flight = 0
        self._aborted = False
        self._end = 0
        # a small file is one buffered write and its fsync: everything else costs more than its bytes
        self._small = nbytes <= _SMALL_BYTES
        self._direct = store.direct and not self._small
        self._shared = shared
        self._edges_fd = -1
        self._edges: list[tuple[int, bytes]] = []
        self._edges_bytes = 0
        self._edges_lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CREAT | (0 if shared else os.O_EXCL)
        self._fd = -1
        if self._direct:
            try:
                self._fd = self._ops.open(path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in NO_DIRECT:
                    raise
                store.direct = self._direct = False
                if not shared:
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
            if self._shared and self._direct:
                self._write_exactly(view[:nbytes], offset)
                return
            if self._direct:
                padded = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                if self._write_direct(view[:padded], offset):
                    return
            self._write(self._fd, view[:nbytes], offset)
        finally:
            self._end_write()

    def finish(self, nbytes: int) -> None:
        # a shared file has its size by the writes to its end
        if not self._shared and (not self._small or self._end != nbytes):
            self._ops.truncate(self._fd, nbytes)
        self._write_edges()
        self._ops.fsync(self._fd)
        fds, self._fd, self._edges_fd = (self._edges_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
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
            fds, self._fd, self._edges_fd = (self._edges_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    self._ops.close(fd)

    def _write_exactly(self, view: memoryview, offset: int) -> None:
        """First and last block through the page cache where they are not whole, what is between past it."""
        head = min(-offset % ALIGNMENT_BYTES, len(view))
        body = (len(view) - head) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        edges = [(0, head), (head + body, len(view))]
        if body and not self._write_direct(view[head : head + body], offset + head):
            self._write(self._fd, view[head : head + body], offset + head)
        kept = [(offset + begin, bytes(view[begin:end])) for begin, end in edges if begin < end]
        with self._lock:
            self._edges += kept
            self._edges_bytes += sum(len(data) for _, data in kept)
            full = self._edges_bytes > _MAX_EDGES_BYTES
        if full:
            self._write_edges()

    def _write_edges(self) -> None:
        """All at once: each has to wait until no direct write of anyone is on its way to the file."""
        with self._edges_lock:
            with self._lock:
                edges, self._edges, self._edges_bytes = self._edges, [], 0
            if edges and self._edges_fd < 0:
                self._edges_fd = self._ops.open(self.path, os.O_WRONLY)
            for offset, data in sorted(edges):
                self._write(self._edges_fd, memoryview(data), offset)

    def _write_direct(self, view: memoryview, offset: int) -> bool:
        """False where the file system took the flag and refuses the transfer: then it goes on through the cache."""
        try:
            self._write(self._fd, view, offset)
            return True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._leave_direct()
        return False

    def _write(self, fd: int, view: memoryview, offset: int) -> None:
        while view:
            if self._aborted:
                raise SaveFailed(f"{self.path}: the attempt was given up")
            written = self._ops.pwrite(fd, view, offset)
            if written <= 0:
                raise SaveFailed(errno.EIO, f"{self.path}: a write of {len(view)} bytes made no progress")
            view, offset = view[written:], offset + written
        with self._lock:
            self._end = max(self._end, offset)

    def _leave_direct(self) -> None:
        with self._lock:
            if self._direct:
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._direct = False


def _try_exclusive(path: str) -> int | None:
    """A descriptor that holds the file's exclusive lock; -1 where there is nothing to lock; None where it is taken."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, os.O_RDWR | flags)  # NFS gives an exclusive lock to those alone who may write
        except OSError:
            fd = os.open(path, os.O_RDONLY | flags)
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
