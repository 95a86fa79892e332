"""Tests of code that saves checkpoints use these doubles: devices that are slow or stuck, or fail one call of your
choice.

Put one into a store: ``checkpointer._store.ops = GatedOps()``, or make ``LocalStore(path, ops=…)``.
"""

from __future__ import annotations

import os
import threading
import time

from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import Buffer


class SlowOps(PosixOps):
    """Makes every write take ``seconds`` longer: the arena stays full while training goes on. Thread-safe."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        time.sleep(self.seconds)
        return super().pwrite(fd, data, offset)


class GatedOps(PosixOps):
    """Makes writes wait until ``gate`` is set: a save stays in flight for as long as a test needs it. Thread-safe."""

    def __init__(self, timeout_seconds: float = 30.0) -> None:
        self.gate = threading.Event()
        self.timeout_seconds = timeout_seconds

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self.gate.wait(self.timeout_seconds)
        return super().pwrite(fd, data, offset)


class FaultyOps(PosixOps):
    """Records every call as ``(name, subject)`` in ``log`` and fails one of them.

    With ``fail = ("fsync", 2, errno.EIO)`` the second fsync from then on raises. ``seen`` counts the calls of that
    name. ``short_writes`` lets every write take at most 4096 bytes.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.fail: tuple[str, int, int] | None = None
        self.short_writes = False
        self.seen = 0

    def _call(self, name: str, subject: object) -> None:
        self.log.append((name, os.path.basename(str(subject))))
        if self.fail is not None and self.fail[0] == name:
            self.seen += 1
            if self.seen == self.fail[1]:
                raise OSError(self.fail[2], os.strerror(self.fail[2]))

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self._call("open", path)
        return super().open(path, flags, mode)

    def close(self, fd: int) -> None:
        super().close(fd)
        self._call("close", fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._call("pwrite", fd)
        return super().pwrite(fd, memoryview(data)[:4096] if self.short_writes else data, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        self._call("truncate", fd)
        super().truncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        self._call("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        super().fsync(fd)

    def fsync_directory(self, path: str) -> None:
        self._call("fsync_directory", path)
        super().fsync_directory(path)

    async def write_file(self, path: str, data: bytes) -> None:
        self._call("write_file", path)
        await super().write_file(path, data)

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path)
        super().mkdir(path)

    def link(self, source: str, target: str) -> None:
        self._call("link", target)
        super().link(source, target)

    def reflink(self, source: str, target: str) -> None:
        self._call("reflink", target)
        super().reflink(source, target)

    def rename_noreplace(self, source: str, target: str) -> None:
        self._call("rename_noreplace", target)
        super().rename_noreplace(source, target)


class ThrottledOps(PosixOps):
    """Behaves as a device that takes ``bytes_per_second``, all writers together: a network file system, a cheap cloud
    disk. Thread-safe."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_seconds = 0.0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        nbytes = memoryview(data).nbytes
        with self._lock:
            self._free_seconds = max(self._free_seconds, time.monotonic()) + nbytes / self.bytes_per_second
            until = self._free_seconds
        written = super().pwrite(fd, data, offset)
        time.sleep(max(0.0, until - time.monotonic()))
        return written
