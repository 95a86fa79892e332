"""The doctor makes these system calls beyond the store's; its tests replace them here."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import sys

from asyncckpt.storage.posix import PosixOps

_TRY_LOCK = """
import errno, fcntl, os, struct, sys
fd = os.open(sys.argv[2], os.O_RDWR)
try:
    if sys.argv[1] == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
except OSError as error:
    raise SystemExit(3 if error.errno in (errno.EAGAIN, errno.EACCES) else 4)
"""
_CACHESTAT = 451  # Linux 6.5 and newer have it, with the same number on every architecture


class DoctorOps(PosixOps):
    """Makes one system call a method, thin and stateless like ``PosixOps``."""

    def lock_whole(self, fd: int) -> None:
        """Take the exclusive ``flock`` or raise ``BlockingIOError``."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lock_open_description(self, fd: int) -> None:
        """Take the exclusive open file description (byte range) lock or raise ``BlockingIOError``."""
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))

    def lock_elsewhere(self, path: str, kind: str) -> bool:
        """Whether another process can take the lock (``flock`` or ``ofd``). Blocks for as long as Python takes to
        start. Raises ``OSError`` where that process could not say."""
        command = [sys.executable, "-I", "-S", "-c", _TRY_LOCK, kind, path]
        try:
            code = subprocess.run(command, capture_output=True, timeout=60, check=False).returncode
        except subprocess.TimeoutExpired as error:
            raise OSError(errno.ETIMEDOUT, "another process did not get to try the lock within 60 s") from error
        if code not in (0, 3):
            raise OSError(errno.EIO, "another process could not try the lock")
        return code == 0

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def can_seek(self, fd: int, offset: int) -> bool:
        """Whether a file may be that long: the kernel refuses to seek past what the file system can hold."""
        try:
            return os.lseek(fd, offset, os.SEEK_SET) == offset
        except OSError:
            return False

    def statvfs(self, path: str) -> os.statvfs_result:
        return os.statvfs(path)

    def drop_cache(self, fd: int) -> None:
        """Forget the file's clean pages, so that it is read from the device."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def unwritten_pages(self, fd: int) -> int | None:
        """Return how many pages of the file are dirty or on their way to the device; None where the kernel does not
        say."""
        if not sys.platform.startswith("linux"):
            return None
        whole, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        call = ctypes.CDLL(None, use_errno=True).syscall
        if call(ctypes.c_long(_CACHESTAT), fd, ctypes.byref(whole), ctypes.byref(answer), 0) != 0:
            return None
        return answer[1] + answer[2]
