"""The way back from a local or network file system: descriptors, never paths that could be swapped underneath."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading

from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound
from asyncckpt.protocols import ALIGNMENT_BYTES, Buffer
from asyncckpt.storage.posix import NO_DIRECT, PosixOps

MANIFEST_FILE = "manifest.json"


class LocalReader:
    """An open checkpoint: files are opened relative to the directory's descriptor, links never followed; a shared
    lock on the manifest keeps retention away until ``close``."""

    def __init__(self, directory: str, name: str, *, ops: PosixOps | None = None, direct: bool = True) -> None:
        self.name = name
        self.path = os.path.join(directory, name)
        self._ops = ops or PosixOps()
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()
        self._fds: dict[str, tuple[int, bool]] = {}
        self._guard = -1
        try:
            self._dir = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CheckpointNotFound(f"{self.path}: no such checkpoint") from error
        except OSError as error:
            raise CheckpointDamaged(f"{self.path} is no plain directory ({error.strerror})") from error
        with contextlib.suppress(OSError, CheckpointDamaged):  # without a manifest there is nothing to protect
            self._guard = self._open_plain(MANIFEST_FILE)
            fcntl.flock(self._guard, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def files(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name in os.listdir(self._dir):
            info = os.stat(name, dir_fd=self._dir, follow_symlinks=False)
            if name.startswith(".nfs"):
                continue
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointDamaged(f"{self.path}/{name} is no regular file")
            sizes[name] = info.st_size
        return sizes

    def read_small(self, file: str, limit_bytes: int) -> bytes:
        fd = self._open_plain(file)
        try:
            size = os.fstat(fd).st_size
            if size > limit_bytes:
                raise CheckpointDamaged(f"{self.path}/{file} has {size} bytes, more than the limit of {limit_bytes}")
            parts: list[bytes] = []
            while part := os.read(fd, min(size + 1, 1 << 20)):
                parts.append(part)
                if sum(map(len, parts)) > limit_bytes:
                    raise CheckpointDamaged(f"{self.path}/{file} grew past {limit_bytes} bytes while it was read")
            return b"".join(parts)
        finally:
            os.close(fd)

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        view = memoryview(buffer)
        padded = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        fd, direct = self._open_data(file)
        done = 0
        while done < nbytes:
            target = view[done:padded] if direct else view[done:nbytes]
            try:
                got = self._ops.preadv(fd, target, offset + done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                direct = False
                continue
            if got == 0:
                break
            done += got
            if direct and done % ALIGNMENT_BYTES:
                break  # only the end of the file is unaligned
        return min(done, nbytes)

    def close(self) -> None:
        with self._lock:
            fds = [fd for fd, _ in self._fds.values()] + [self._guard, self._dir]
            self._fds, self._guard, self._dir = {}, -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _open_plain(self, file: str, extra_flags: int = 0) -> int:
        # O_NONBLOCK: opening a FIFO somebody planted must not hang
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | extra_flags
        try:
            fd = os.open(file, flags, dir_fd=self._dir)
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{self.path}/{file} is missing") from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CheckpointDamaged(f"{self.path}/{file} is no regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CheckpointDamaged(f"{self.path}/{file} is no regular file")
        return fd

    def _open_data(self, file: str) -> tuple[int, bool]:
        with self._lock:
            found = self._fds.get(file)
            if found is None:
                direct = self._direct
                try:
                    fd = self._open_plain(file, os.O_DIRECT if direct else 0)
                except OSError as error:
                    if not direct or error.errno not in NO_DIRECT:
                        raise
                    direct = False
                    fd = self._open_plain(file)
                found = self._fds[file] = (fd, direct)
        return found
