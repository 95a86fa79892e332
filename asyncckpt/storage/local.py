"""A local store keeps a run in a directory on a local or network file system.

Names: a checkpoint is a plain directory; ``.tmp-<step>-<uuid>`` is an unpublished attempt, ``.trash-<name>-<uuid>`` is
being deleted, ``.replaced-<name>-<uuid>`` makes way for the attempt with that uuid, ``.damaged-…`` was set aside. All
of ours start with a dot, and have ``~`` for each ``-`` of ``<name>``, so that no framework takes them for checkpoints:
torchtitan looks for ``step-`` and a number anywhere in a name. Earlier versions left the name as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import threading
import uuid
from collections.abc import Mapping

from asyncckpt.errors import RunPathError
from asyncckpt.protocols import Capability, FileInfo, PendingDirectory, Replaced
from asyncckpt.storage.lease import Lease, read_holder
from asyncckpt.storage.pending_dir import LocalPendingDirectory
from asyncckpt.storage.posix import PosixOps
from asyncckpt.storage.reader import LocalReader
from asyncckpt.types import MANIFEST_FILE, Holder, LeaseOptions

log = logging.getLogger("asyncckpt")

TEMP_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
DAMAGED_PREFIX = ".damaged-"
REPLACED_PREFIX = ".replaced-"
#: Names that this library alone gives, to what may be deleted once its owner is gone. Whatever else begins with a dot
#: is somebody else's.
_LEFTOVER = re.compile(r"\.tmp-([0-9]{8,}|probe|latest|lease|doctor)-[0-9a-f]{32}|\.trash-.+-[0-9a-f]{32}")
_REPLACED = re.compile(r"\.replaced-(?P<name>.+)-(?P<attempt>[0-9a-f]{32})")
#: Answers that mean "that directory is not yours to sync", of one that was there before.
_NO_SYNC = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL})


class LocalStore:
    """Keeps a run in a directory. Thread-safe; its methods block on the device. What they promise stands in
    ``protocols.Store`` and ``protocols.RenamingStore``.

    ``ops``: the system calls, for tests. ``direct``: read and write past the page cache, where the file system has
    O_DIRECT."""

    path: str
    address: str

    def __init__(self, path: str, *, ops: PosixOps | None = None, direct: bool = True) -> None:
        self.path = self.address = os.path.abspath(path)  # now: programs change their working directory
        self.ops = ops or PosixOps()
        self.direct = direct and hasattr(os, "O_DIRECT")
        #: Whether the file system shares blocks between files, and files between names: found out by trying.
        self.reflinks = self.links = True
        self._trash_lock = threading.Lock()
        #: What lies in the trash, but is still being read.
        self._trash: list[str] = []

    @property
    def capabilities(self) -> frozenset[Capability]:
        links = {Capability.LINKS} if self.reflinks or self.links else set()
        return frozenset({Capability.RENAMES, Capability.SHARED_FILES, Capability.LOCKS} | links)

    def prepare(self, *, create_parents: bool = False) -> None:
        """Make the run directory usable for writing. Raises ``RunPathError`` with the way out."""
        parent = os.path.dirname(os.path.abspath(self.path))
        try:
            if not create_parents and not os.path.isdir(parent):
                raise RunPathError(
                    f"{self.path}: the parent directory {parent} does not exist. Create it, mount its file system, "
                    f"or pass run=RunOptions(create_parents=True)"
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
        """Make a directory and the parents it lacks. The deepest one that exists is synced too, because whoever made
        it may have died before its name was durable."""
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

    def hold(self, *, takeover: bool = False, options: LeaseOptions | None = None) -> Lease:
        return Lease.acquire(self.path, takeover=takeover, options=options)

    def holder(self) -> Holder | None:
        return read_holder(self.path)

    def begin(self, step: int, attempt: str, *, name: str = "", shared: bool = False) -> PendingDirectory:
        self.empty_trash()
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
        return LocalPendingDirectory(self, path, step, attempt)

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

    def listing(self, name: str) -> Mapping[str, FileInfo]:
        try:
            found = self.ops.scan(os.path.join(self.path, name))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry: _info(status) for entry, status in found.items()}

    def open(self, name: str) -> LocalReader:
        return LocalReader(self.path, name, ops=self.ops, direct=self.direct)

    def remove(self, name: str) -> bool:
        source = os.path.join(self.path, name)
        guard = _try_exclusive(os.path.join(source, MANIFEST_FILE))
        if guard is None:
            return False
        try:
            trash = os.path.join(self.path, f"{TRASH_PREFIX}{_veiled(name)}-{uuid.uuid4().hex}")
            self.ops.rename_noreplace(source, trash)
        finally:
            if guard >= 0:
                os.close(guard)
        # a power loss could keep the deletions and forget the rename: half a checkpoint, under its own name
        self.ops.fsync_directory(self.path)
        self.delete_tree(trash)
        return True

    def throw_away(self, path: str, name: str) -> None:
        """Delete the directory at ``path``, which holds the checkpoint that had ``name`` until another one took its
        place; where somebody still reads it, only once they have finished. Never raises."""
        trash = os.path.join(self.path, f"{TRASH_PREFIX}{_veiled(name)}-{uuid.uuid4().hex}")
        try:
            self.ops.rename_noreplace(path, trash)
        except OSError as error:
            log.warning("could not delete %s: %s (the next run tries again)", path, error)
            return
        with self._trash_lock:
            self._trash.append(trash)
        self.empty_trash()

    def empty_trash(self) -> None:
        """Delete what ``throw_away`` was given, except what is still being read. Never raises."""
        with self._trash_lock:
            waiting, self._trash = self._trash, []
        for path in waiting:
            if not self._delete_unread(path):
                with self._trash_lock:
                    self._trash.append(path)

    def _delete_unread(self, path: str) -> bool:
        """Delete a directory that has no checkpoint's name any more; return False where a reader holds it."""
        guard = _try_exclusive(os.path.join(path, MANIFEST_FILE))
        if guard is None:
            return False
        if guard >= 0:
            os.close(guard)
        self.delete_tree(path)
        return True

    def set_aside(self, name: str) -> str:
        target = f"{DAMAGED_PREFIX}{_veiled(name)}-{uuid.uuid4().hex[:8]}"
        self.ops.rename_noreplace(os.path.join(self.path, name), os.path.join(self.path, target))
        self.ops.fsync_directory(self.path)
        return target

    def make_way(self, name: str, attempt: str) -> Replaced | None:
        hidden = f"{REPLACED_PREFIX}{_veiled(name)}-{attempt}"
        try:
            self.ops.rename_noreplace(os.path.join(self.path, name), os.path.join(self.path, hidden))
        except FileNotFoundError:
            return None
        self.ops.fsync_directory(self.path)
        return Replaced(hidden, name, attempt)

    def put_back(self, replaced: Replaced) -> bool:
        hidden, target = os.path.join(self.path, replaced.hidden), os.path.join(self.path, replaced.name)
        try:
            self.ops.rename_noreplace(hidden, target)
            self.ops.fsync_directory(self.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            log.error("%s could not get its name back and is %s (%s): the next run tries again", target, hidden, error)
            return False
        return True

    def replaced(self) -> list[Replaced]:
        found = map(_REPLACED.fullmatch, self.ops.scan(self.path))
        return [
            Replaced(match[0], match["name"].replace("~", "-"), match["attempt"])
            for match in found
            if match is not None
        ]

    def reclaim(self) -> list[str]:
        """Delete what dead attempts and interrupted deletions left behind; return the names. Call it only while holding
        the run's lease: whoever made them is then gone or cut off. Raises ``RunPathError`` where the directory
        cannot be read or made durable."""
        try:
            # A trainer killed between its rename and the fsync left a name that only memory knows: it must be durable
            # before anything is deleted on the strength of it.
            self.ops.fsync_directory(self.path)
            entries = self.ops.scan(self.path)
        except OSError as error:
            raise RunPathError(f"{self.path}: cannot be read or synced ({error}); repair the path") from error
        found = {name: info for name, info in entries.items() if _LEFTOVER.fullmatch(name)}
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
        if name.startswith(TRASH_PREFIX):
            if not self._delete_unread(path):
                with self._trash_lock:
                    self._trash.append(path)
            return
        if name.startswith(TEMP_PREFIX):
            # A writer that was cut off after its last look at the lease may be about to publish this: it gets all of it
            # or, once it has another name, nothing.
            trash = os.path.join(self.path, f"{TRASH_PREFIX}{_veiled(name[1:])}-{uuid.uuid4().hex}")
            try:
                self.ops.rename_noreplace(path, trash)
            except FileNotFoundError:
                return
            except OSError as error:
                log.warning("could not delete %s: %s (the next run tries again)", path, error)
                return
            path = trash
        self.delete_tree(path)

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        path = os.path.join(self.path, key)
        folder, name = os.path.split(path)
        if folder != self.path:
            try:
                self.ops.mkdir(folder)
                self.ops.fsync_directory(self.path)
            except FileExistsError:
                self._check_folder(folder)
        temp = os.path.join(folder, f"{TEMP_PREFIX}{name}-{uuid.uuid4().hex}")
        try:
            fd = self.ops.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                self._write_all(fd, data)
                if not replace:
                    self.ops.fsync(fd)
            finally:
                self.ops.close(fd)
            if replace:
                self.ops.replace(temp, path)
                return
            self.ops.rename_noreplace(temp, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.ops.unlink(temp)
            raise
        self.ops.fsync_directory(folder)

    def delete(self, key: str) -> None:
        path = os.path.join(self.path, key)
        with contextlib.suppress(FileNotFoundError):
            self._check_folder(os.path.dirname(path))
            self.ops.unlink(path)

    def _check_folder(self, folder: str) -> None:
        """Raise ``NotADirectoryError`` for a link: what lies behind it is not ours."""
        if folder != self.path and not stat.S_ISDIR(self.ops.lstat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)

    def _write_all(self, fd: int, data: bytes) -> None:
        view, offset = memoryview(data), 0
        while offset < len(view):
            written = self.ops.pwrite(fd, view[offset:], offset)
            if not written:
                raise OSError(errno.EIO, f"a write of {len(view) - offset} bytes made no progress", self.path)
            offset += written

    def delete_tree(self, path: str) -> None:
        """Delete one of our own directories. Entries that others hold (``.nfs*``) and entries that vanish meanwhile are
        tolerated."""
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


def open_at(address: str, *, direct: bool) -> LocalStore:
    """Open a path, or what follows ``file://``, for ``open_store``."""
    return LocalStore(address.removeprefix("file://"), direct=direct)


def _veiled(name: str) -> str:
    """Return a checkpoint's name as it stands in that of a directory which is none. No name that this library gives to
    a checkpoint has a ``~``."""
    return name.replace("-", "~")


def _info(status: os.stat_result) -> FileInfo:
    if stat.S_ISREG(status.st_mode):
        return FileInfo(status.st_size, "file")
    return FileInfo(0, "folder" if stat.S_ISDIR(status.st_mode) else "other")


def _try_exclusive(path: str) -> int | None:
    """Return a descriptor that holds the file's exclusive lock, -1 where there is nothing to lock, or None where
    somebody else holds a lock on it."""
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
