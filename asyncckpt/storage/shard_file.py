"""A shard file is written here: which of its bytes go past the page cache, and when they are on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from typing import TYPE_CHECKING

from asyncckpt import forks
from asyncckpt.errors import SaveFailed
from asyncckpt.memory.buffers import padded
from asyncckpt.storage.posix import NO_DIRECT
from asyncckpt.types import ALIGNMENT_BYTES, SMALL_SHARD_BYTES

if TYPE_CHECKING:
    from asyncckpt.storage.local import LocalStore

_SMALL_BYTES = SMALL_SHARD_BYTES
#: Bytes of blocks that are shared with other ranks, kept until the others are written.
_MAX_EDGES_BYTES = 16 << 20


class LocalShardWriter:
    """Writes a shard file. Aligned extents go past the page cache; an unaligned tail is padded and cut off again.

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
        forks.disarm_in_child(self)
        if shared and self._ops.stat(self._fd).st_nlink > 1:  # it would be written in both
            self.abort()
            raise SaveFailed(f"{path} is linked from another checkpoint, and cannot be written to")
        if self._small:
            return
        try:
            self._ops.reserve(self._fd, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.abort()
                raise
            # reserving is a courtesy: a file system without it (NFSv3, tmpfs variants) still writes

    def disarm(self) -> None:
        # held open by a child, the file would take its space after it was deleted
        fds, self._fd, self._edges_fd = (self._edges_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def write_at(self, view: memoryview, nbytes: int, offset: int) -> None:
        with self._lock:
            if self._fd < 0 or self._aborted:
                raise SaveFailed(f"{self.path}: written to after the attempt was given up")
            self._in_flight += 1
        try:
            if self._shared and self._direct:
                self._write_exactly(view[:nbytes], offset)
                return
            if self._direct and self._write_direct(view[: padded(nbytes)], offset):
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
        """Write the first and the last block through the page cache where they are not whole, and what lies between
        past it."""
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
        """Write the kept edges, all at once: each write waits until no direct write of any rank is on its way to the
        file."""
        with self._edges_lock:
            with self._lock:
                edges, self._edges, self._edges_bytes = self._edges, [], 0
            if edges and self._edges_fd < 0:
                self._edges_fd = self._ops.open(self.path, os.O_WRONLY)
            for offset, data in sorted(edges):
                self._write(self._edges_fd, memoryview(data), offset)

    def _write_direct(self, view: memoryview, offset: int) -> bool:
        """Write past the page cache. Return False where the file system took the flag and refuses the transfer: this
        file goes through the cache from then on."""
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
