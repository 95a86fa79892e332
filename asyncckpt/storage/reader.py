"""A checkpoint on a local or network file system is read by descriptors, never by paths that could be swapped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import NOT_REGULAR
from asyncckpt.storage.posix import NO_DIRECT, PosixOps
from asyncckpt.types import ALIGNMENT_BYTES, MANIFEST_FILE, Buffer

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
#: Directories a checkpoint's files may lie in; deeper ones are not ours.
_MAX_FOLDERS = 2
#: Idle files kept open.
_MAX_OPEN = 16


@dataclass(slots=True)
class _OpenFile:
    fd: int
    direct: bool
    users: int = 0


class LocalReader:
    """Reads an open checkpoint. Files are opened relative to the directory's descriptor, links never followed; a shared
    lock on the manifest keeps retention away until ``close``."""

    def __init__(self, directory: str, name: str, *, ops: PosixOps | None = None, direct: bool = True) -> None:
        self.name = name
        self.path = os.path.join(directory, name)
        self._ops = ops or PosixOps()
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()
        self._open: dict[str, _OpenFile] = {}
        self._guard = -1
        try:
            self._dir = self._ops.open_to_read(self.path, _FOLDER_FLAGS)
        except FileNotFoundError as error:
            raise CheckpointNotFound(f"{self.path}: no such checkpoint") from error
        except OSError as error:
            raise CheckpointDamaged(f"{self.path} is no plain directory ({error.strerror})") from error
        with contextlib.suppress(OSError, CheckpointDamaged):  # without a manifest there is nothing to protect
            self._guard = self._open_plain(MANIFEST_FILE)
            self._ops.lock(self._guard, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def files(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        self._list(self._dir, "", sizes)
        return sizes

    def files_nbytes(self, file: str) -> int:
        fd = self._open_plain(file)
        try:
            return self._ops.stat(fd).st_size
        finally:
            self._shut(fd)

    def _list(self, folder: int, prefix: str, sizes: dict[str, int]) -> None:
        for name in self._ops.names(folder):
            info = self._ops.lstat(name, folder)
            if name.startswith(".nfs"):
                continue
            if stat.S_ISDIR(info.st_mode) and prefix.count("/") < _MAX_FOLDERS:
                try:
                    child = self._ops.open_to_read(name, _FOLDER_FLAGS, folder)
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):  # swapped since it was looked at
                        raise
                    sizes[f"{prefix}{name}"] = NOT_REGULAR
                    continue
                try:
                    self._list(child, f"{prefix}{name}/", sizes)
                finally:
                    self._shut(child)
                continue
            sizes[f"{prefix}{name}"] = info.st_size if stat.S_ISREG(info.st_mode) else NOT_REGULAR

    def read_small(self, file: str, limit_bytes: int) -> bytes:
        if file == MANIFEST_FILE and self._guard >= 0:  # the very file that is locked, whatever bears its name by now
            return self._read_whole(self._guard, file, limit_bytes)
        fd = self._open_plain(file)
        try:
            return self._read_whole(fd, file, limit_bytes)
        finally:
            self._shut(fd)

    def _read_whole(self, fd: int, file: str, limit_bytes: int) -> bytes:
        size = self._ops.stat(fd).st_size
        if size > limit_bytes:
            raise CheckpointDamaged(f"{self.path}/{file} has {size} bytes, more than the limit of {limit_bytes}")
        parts: list[bytes] = []
        total = 0
        while part := self._ops.pread(fd, max(4096, min(size + 1, 1 << 20)), total):
            parts.append(part)
            total += len(part)
            if total > limit_bytes:
                raise CheckpointDamaged(f"{self.path}/{file} grew past {limit_bytes} bytes while it was read")
        return b"".join(parts)

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        with self._data(file) as entry:
            return self._read(entry, memoryview(buffer), nbytes, offset)

    def _read(self, entry: _OpenFile, view: memoryview, nbytes: int, offset: int) -> int:
        whole = padded(nbytes)
        fd, direct = entry.fd, entry.direct
        done = 0
        while done < nbytes:
            target = view[done:whole] if direct else view[done:nbytes]
            try:
                got = self._ops.preadv(fd, target, offset + done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                entry.direct = direct = False
                continue
            if got == 0:
                break
            done += got
            if direct and done % ALIGNMENT_BYTES:
                break  # only the end of the file is unaligned
        return min(done, nbytes)

    def disarm(self) -> None:
        # a child that holds it open holds the lock that keeps retention away, too
        for fd in (*(entry.fd for entry in self._open.values()), self._guard, self._dir):
            if fd >= 0:
                os.close(fd)
        self._open, self._guard, self._dir = {}, -1, -1

    def close(self) -> None:
        with self._lock:
            fds = [entry.fd for entry in self._open.values()] + [self._guard, self._dir]
            self._open, self._guard, self._dir = {}, -1, -1
        for fd in fds:
            if fd >= 0:
                self._shut(fd)

    def _shut(self, fd: int) -> None:
        """Close a descriptor. An error of that says nothing about what was read, and must not keep others open."""
        with contextlib.suppress(OSError):
            self._ops.close_read(fd)

    def _open_plain(self, file: str, extra_flags: int = 0) -> int:
        # O_NONBLOCK: opening a FIFO somebody planted must not hang
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | extra_flags
        *folders, name = file.split("/")
        folder = self._dir
        try:
            for part in folders:  # one by one: no link on the way is followed
                inside = self._ops.open_to_read(part, _FOLDER_FLAGS, folder)
                if folder != self._dir:
                    self._shut(folder)
                folder = inside
            # looked at before it is opened: opening a device can do something
            if not stat.S_ISREG(self._ops.lstat(name, folder).st_mode):
                raise CheckpointDamaged(f"{self.path}/{file} is no regular file")
            fd = self._ops.open_to_read(name, flags, folder)
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{self.path}/{file} is missing") from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
                raise CheckpointDamaged(f"{self.path}/{file} is no regular file") from error
            raise
        finally:
            if folder != self._dir:
                self._shut(folder)
        try:
            if not stat.S_ISREG(self._ops.stat(fd).st_mode):
                raise CheckpointDamaged(f"{self.path}/{file} is no regular file")
        except BaseException:
            self._shut(fd)
            raise
        return fd

    @contextlib.contextmanager
    def _data(self, file: str) -> Iterator[_OpenFile]:
        """Give the file, open, and keep those that were used last open."""
        with self._lock:
            entry = self._open.pop(file, None) or self._open_data(file)
            self._open[file] = entry
            entry.users += 1
            for name in [name for name, other in self._open.items() if not other.users][: -_MAX_OPEN or None]:
                self._shut(self._open.pop(name).fd)
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1

    def _open_data(self, file: str) -> _OpenFile:
        direct = self._direct
        try:
            return _OpenFile(self._open_plain(file, os.O_DIRECT if direct else 0), direct)
        except OSError as error:
            if not direct or error.errno not in NO_DIRECT:
                raise
        return _OpenFile(self._open_plain(file), False)
