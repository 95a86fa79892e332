"""Each system call that the local store makes is one method here: the seam where tests record, fail and delay them.

Every call retries nothing and swallows nothing: what the kernel says is what the caller gets. ``EINTR`` is retried
by Python itself (PEP 475), never an error of ``fsync`` or ``close``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Mapping
from typing import Final

from asyncckpt.types import Buffer

#: File systems that refuse O_DIRECT, at open or at the first transfer, answer with one of these.
NO_DIRECT: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM})
#: Answers that mean "no (more) hard links here": a file system without them, another device, too many links.
NO_LINK: Final = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES, errno.EINVAL}
)
#: Answers that mean "files cannot share blocks here".
NO_REFLINK: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EPERM, errno.EBADF}
)
_libc: Final = ctypes.CDLL(None, use_errno=True)
_FICLONE: Final = 0x40049409  # linux/fs.h
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
#: Answers that mean "this file system or kernel cannot do that kind of rename" (NFS says EINVAL).
NO_FLAGS: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class PosixOps:
    """Makes the system calls. Stateless and thread-safe."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def open_to_read(self, path: str, flags: int, folder: int | None = None) -> int:
        """Open a file relative to the directory ``folder``. Creates nothing."""
        return os.open(path, flags | os.O_CLOEXEC, dir_fd=folder)

    def close_read(self, fd: int) -> None:
        """Close what ``open_to_read`` opened."""
        os.close(fd)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """Read a part of a small file; data is read by ``preadv``."""
        return os.pread(fd, nbytes, offset)

    def stat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def lstat(self, path: str, folder: int | None = None) -> os.stat_result:
        return os.stat(path, dir_fd=folder, follow_symlinks=False)

    def names(self, folder: int) -> list[str]:
        return os.listdir(folder)

    def lock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def reserve(self, fd: int, nbytes: int) -> None:
        """Allocate blocks ahead, which finds a full disk early but proves nothing about data. File systems may not
        support it."""
        os.posix_fallocate(fd, 0, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    async def write_file(self, path: str, data: bytes) -> None:
        """Create (exclusively), write and fsync a small file. ``aiofiles`` keeps the event loop free meanwhile."""
        import aiofiles.os  # brings asyncio, which reading has no use for

        async with aiofiles.open(path, "xb", buffering=0) as file:
            view = memoryview(data)
            while view:  # a raw write may be short
                view = view[await file.write(view) :]
            fd = file.fileno()
            await aiofiles.os.wrap(self.fsync)(fd)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def rename_noreplace(self, source: str, target: str) -> None:
        """Rename, failing with ``FileExistsError`` where the target exists, an empty directory included.

        Where the file system has no such rename, an exclusive lock on the parent and a check stand in: safe against
        every writer that uses this library, and the run's lease admits only one.
        """
        code = self.try_rename_noreplace(source, target)
        if code == 0:
            return
        if code not in NO_FLAGS:
            raise OSError(code, os.strerror(code), source, None, target)
        parent = os.open(os.path.dirname(target) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            os.rename(source, target)
        finally:
            os.close(parent)

    def try_rename_noreplace(self, source: str, target: str) -> int:
        """Rename, and return the kernel's answer alone, with nothing standing in for it: 0, or the errno."""
        return _renameat2(source, target, _RENAME_NOREPLACE)

    def exchange(self, first: str, second: str) -> None:
        """Swap two names atomically: at no moment is either missing. Raises ``OSError`` where unsupported."""
        code = _renameat2(first, second, _RENAME_EXCHANGE)
        if code:
            raise OSError(code, os.strerror(code), first, None, second)

    def replace(self, source: str, target: str) -> None:
        """Rename over a *file* (the ``latest`` hint, the lease). It is never used on a checkpoint."""
        os.replace(source, target)

    def link(self, source: str, target: str) -> None:
        """Give a file a further name. Raises ``OSError`` where the file system has none, and where the target
        exists."""
        os.link(source, target, follow_symlinks=False)

    def reflink(self, source: str, target: str) -> None:
        """Make a new file that shares the source's blocks, and fsync it. Raises ``OSError`` where the file system
        cannot; the target may then be there, empty."""
        old = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                fcntl.ioctl(new, _FICLONE, old)
                self.fsync(new)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def scan(self, path: str) -> Mapping[str, os.stat_result]:
        """Return the ``lstat`` result of each of a directory's entries by name; entries that vanish meanwhile are left
        out."""
        found: dict[str, os.stat_result] = {}
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    found[entry.name] = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
        return found

    def free_bytes(self, path: str) -> int:
        stats = os.statvfs(path)
        return stats.f_bavail * stats.f_frsize


def _renameat2(source: str, target: str, flags: int) -> int:
    """Rename with flags; return 0, or the errno: ``ENOSYS`` where this is not Linux."""
    if not sys.platform.startswith("linux"):
        return errno.ENOSYS
    try:
        call = _libc.renameat2
    except AttributeError:
        return errno.ENOSYS
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return 0
    return ctypes.get_errno()
