"""``Speed`` measures how fast a path writes and reads the way a save does: several threads move extents, then one fsync
follows. Time and bytes are bounded."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES
from asyncckpt.doctor.scratch import Scratch
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.types import ALIGNMENT_BYTES

_THREADS = (1, 2, 4, 8)
_READERS = 4
_EXTENT_BYTES = 8 << 20
_FIRST_BYTES = 1 << 20
_ENCODED_BYTES = 4 << 20


class Speed:
    """Writes and reads one file again and again, never more than ``max_bytes`` at one time. A pass starts no transfer
    after ``seconds``, and waits for one that is in a slow device."""

    def __init__(self, scratch: Scratch, *, direct: bool, seconds: float, max_bytes: int) -> None:
        self._scratch = scratch
        self._direct = direct
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._path = scratch.file("speed")
        self._random = memoryview(aligned_buffer(_EXTENT_BYTES))
        self._random[:] = os.urandom(_EXTENT_BYTES)
        self._buffers = threading.local()

    def direct(self) -> dict[int, float]:
        """Return bytes a second with O_DIRECT by the number of writing threads; empty where the file system has no
        O_DIRECT."""
        if not self._direct:
            return {}
        rates: dict[int, float] = {}
        pace = self._write(1, min(_FIRST_BYTES, self._max_bytes), direct=True)
        for threads in _THREADS:
            nbytes = self._amount(pace)
            if threads > 1 and nbytes < threads * _EXTENT_BYTES:
                break
            rates[threads] = self._write(threads, nbytes, direct=True)
            pace = max(pace, rates[threads])
        return rates

    def buffered(self, pace: float) -> dict[int, float]:
        """Return bytes a second through the page cache, by the number of writing threads. ``pace`` is what O_DIRECT
        reached, or 0; it bounds how long fsync takes."""
        pace = pace or self._write(1, min(_FIRST_BYTES, self._max_bytes), direct=False)
        rates = {1: self._write(1, self._amount(pace), direct=False)}
        # the kernel writes a file's pages back with one thread, whoever made them dirty, so more threads change little
        if self._amount(rates[1]) >= 2 * _EXTENT_BYTES:
            rates[2] = self._write(2, self._amount(rates[1]), direct=False)
        return rates

    def read(self) -> tuple[float, bool]:
        """Read what was written last, past the page cache. Return bytes a second, and whether it is what was
        written."""
        ops, size = self._scratch.ops, self._scratch.ops.lstat(self._path).st_size
        fd = ops.open(self._path, os.O_RDONLY | (os.O_DIRECT if self._direct else 0))
        same = True

        def read(offset: int, nbytes: int) -> int:
            nonlocal same
            buffer = self._buffer()
            got = ops.preadv(fd, buffer[:nbytes], offset)
            if offset == 0:
                same = bool(np.array_equal(np.frombuffer(buffer[:got], np.uint8), self._random[:got]))
            return got

        try:
            ops.drop_cache(fd)
            began = time.perf_counter()
            return self._pass(read, size, _READERS) / (time.perf_counter() - began), same
        finally:
            ops.close(fd)

    def _amount(self, pace: float) -> int:
        """Return how many bytes the device takes in the time there is."""
        nbytes = min(self._max_bytes, max(_FIRST_BYTES, int(pace * self._seconds)))
        return max(ALIGNMENT_BYTES, nbytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES)

    def _write(self, threads: int, nbytes: int, *, direct: bool) -> float:
        ops = self._scratch.ops
        with contextlib.suppress(FileNotFoundError):
            ops.unlink(self._path)
        fd = ops.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0))

        def write(offset: int, nbytes: int) -> int:
            within = offset % _EXTENT_BYTES
            return ops.pwrite(fd, self._random[within : within + nbytes], offset)

        try:
            began = time.perf_counter()
            with contextlib.suppress(OSError):  # a courtesy, as in a save: the write itself reports what is wrong
                ops.reserve(fd, nbytes)
            moved = self._pass(write, nbytes, threads)
            ops.truncate(fd, moved)
            ops.fsync(fd)
            return moved / (time.perf_counter() - began)
        finally:
            ops.close(fd)

    def _pass(self, transfer: Callable[[int, int], int], nbytes: int, threads: int) -> int:
        """Move up to ``nbytes`` in extents, from the file's beginning and without holes; return how many were moved."""
        offsets = itertools.count(0, _EXTENT_BYTES)
        until = time.perf_counter() + self._seconds
        stop = threading.Event()

        def work() -> int:
            moved = 0
            while True:
                if stop.is_set() or time.perf_counter() > until:
                    return moved
                offset = next(offsets)  # atomic, because it is C
                end = min(offset + _EXTENT_BYTES, nbytes)
                while offset < end:
                    done = transfer(offset, end - offset)
                    if done <= 0:
                        return moved
                    offset, moved = offset + done, moved + done
                if end == nbytes or offset >= nbytes:
                    return moved

        with ThreadPoolExecutor(threads, "asyncckpt-doctor") as pool:
            try:
                running = [pool.submit(work) for _ in range(threads)]
                wait(running)
            finally:
                # an interrupted doctor deletes its files next, and leaving the pool waits for the last write
                stop.set()
        return sum(one.result() for one in running)

    def _buffer(self) -> memoryview:
        """Return the calling thread's buffer; fresh memory would cost more than reading."""
        found: memoryview | None = getattr(self._buffers, "view", None)
        if found is None:
            buffer: mmap.mmap = aligned_buffer(_EXTENT_BYTES)
            found = self._buffers.view = memoryview(buffer)
        return found


def encoding_rate() -> float:
    """Return the bytes a second that one thread encodes with ``auto``, on float32 values like weights."""
    codec = codecs.get("auto")
    values = np.random.default_rng(0).normal(size=_ENCODED_BYTES // 4).astype(np.float32).view(np.uint8)
    out = np.empty(values.nbytes + FRAME_OVERHEAD_BYTES, np.uint8)
    codec.encode(values, 4, out)  # this makes the coder and faults the memory in
    began = time.perf_counter()
    codec.encode(values, 4, out)
    return values.nbytes / (time.perf_counter() - began)
