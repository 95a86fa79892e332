"""A file of a source is read once for all that want its bytes: whoever imports its tensors, and whoever digests it.

Its blocks are kept for a moment, so that several threads which go through it side by side share what one of them has
read. A block comes from the page cache where it lies there, and past it where it does not: bringing a large file into
the cache takes longer than reading it does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.storage.posix import NO_DIRECT
from asyncckpt.types import ALIGNMENT_BYTES

#: A block is read at once.
BLOCK_BYTES = 4 << 20
#: So many blocks are kept, beside those that are in use.
_KEPT = 16
#: What the kernel answers where nothing is in the cache, and where it or the file system cannot say.
_NOT_CACHED = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(slots=True, eq=False)
class _Block:
    memory: memoryview
    nbytes: int = 0
    users: int = 0
    error: OSError | None = None
    read: threading.Event = field(default_factory=threading.Event)


class SourceFile:
    """A regular file that is open as ``fd``, which is closed with it; ``info``: what it was then. ``moved``: notified
    when a read goes further than all before it. Thread-safe. Reading blocks, and raises ``OSError``."""

    def __init__(self, fd: int, info: os.stat_result, moved: threading.Condition) -> None:
        self.fd = fd
        self.info = info
        #: Somebody will go through the file with ``read_into``.
        self.expected = False
        #: So far ``read_into`` has come.
        self.reached = 0
        self._moved = moved
        self._direct = -1
        self._tells_cached = True
        self._lock = threading.Lock()
        self._blocks: dict[int, _Block] = {}
        with contextlib.suppress(OSError):  # without /proc, or on a file system without it
            self._direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    @property
    def nbytes(self) -> int:
        """Its size when it was opened."""
        return self.info.st_size

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from ``offset`` on; return how many there were, fewer only where the file
        ends."""
        done = 0
        while done < len(target):
            number, first = divmod(offset + done, BLOCK_BYTES)
            with self.block(number) as data:
                part = data[first : first + len(target) - done]
                if len(part):  # without the GIL, which an assignment would keep
                    np.copyto(np.frombuffer(target[done : done + len(part)], np.uint8), np.frombuffer(part, np.uint8))
            done += len(part)
            if first + len(part) < BLOCK_BYTES and done < len(target):
                break
        if offset + done > self.reached:
            with self._moved:
                self.reached = max(self.reached, offset + done)
                self._moved.notify_all()
        return done

    @contextlib.contextmanager
    def block(self, number: int) -> Iterator[memoryview]:
        """Give the bytes of a block, which are the caller's to read until the ``with`` ends: fewer than
        ``BLOCK_BYTES`` where the file ends."""
        with self._lock:
            block = self._blocks.pop(number, None)
            mine = block is None
            if block is None:
                block = _Block(self._memory())
            self._blocks[number] = block  # the last of them now
            block.users += 1
        try:
            if mine:
                self._read(number, block)
            block.read.wait()
            if block.error is not None:
                raise OSError(block.error.errno, block.error.strerror)
            yield block.memory[: block.nbytes]
        finally:
            with self._lock:
                block.users -= 1
                if block.error is not None and self._blocks.get(number) is block:
                    del self._blocks[number]

    def _memory(self) -> memoryview:
        """Return memory for a block: that of the one which nobody has used for longest, where there are enough."""
        if len(self._blocks) >= _KEPT:
            for number, block in self._blocks.items():
                if not block.users:
                    del self._blocks[number]
                    return block.memory
        return memoryview(aligned_buffer(min(BLOCK_BYTES, max(1, self.nbytes))))

    def _read(self, number: int, block: _Block) -> None:
        offset = number * BLOCK_BYTES
        wanted = min(len(block.memory), max(0, self.nbytes - offset))
        try:
            done = 0
            while done < wanted:
                got = self._read_some(offset + done, block.memory[done:], wanted - done)
                if not got:
                    break
                done += got
            block.nbytes = min(done, wanted)
        except OSError as error:
            block.error = error
        finally:
            block.read.set()

    def _read_some(self, offset: int, memory: memoryview, wanted: int) -> int:
        """Read up to ``wanted`` bytes, at least one where the file has not ended."""
        if self._tells_cached:
            try:  # the last bytes alone at first: the kernel begins to read ahead where they are not there
                last = min(wanted, ALIGNMENT_BYTES)
                os.preadv(self.fd, [memory[wanted - last : wanted]], offset + wanted - last, os.RWF_NOWAIT)
                if got := os.preadv(self.fd, [memory[:wanted]], offset, os.RWF_NOWAIT):
                    return got
            except OSError as error:
                if error.errno not in _NOT_CACHED:
                    raise
                self._tells_cached = error.errno == errno.EAGAIN
        if self._direct >= 0 and offset == padded(offset):
            try:
                return os.preadv(self._direct, [memory[: padded(wanted)]], offset)
            except OSError as error:
                if error.errno not in NO_DIRECT:
                    raise
        return os.preadv(self.fd, [memory[:wanted]], offset)

    def close(self) -> None:
        """Close it. Idempotent."""
        fds, self.fd, self._direct = (self.fd, self._direct), -1, -1
        self._blocks.clear()
        for fd in fds:
            if fd >= 0:
                os.close(fd)
