"""The ceilings say what this machine does with the same bytes and nothing else in the way."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence

import torch

ALIGNMENT_BYTES = 4096
CHUNK_BYTES = 16 << 20
WRITE_THREADS = 2
READ_THREADS = 8


class Ceiling:
    """Holds the tensors' bytes in one warm, aligned buffer, and times ways to move them. Not thread-safe; blocks.

    ``directory`` must be on the measured file system. ``small_pages``: the buffer is of pages of 4 KiB instead of huge
    ones, as memory is that processes share. Raises ``OSError`` where the file system refuses O_DIRECT.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], directory: str, *, small_pages: bool = False) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self._tensors = tensors
        self._directory = directory
        self._written = 0
        padded = -(-self.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._memory = mmap.mmap(-1, padded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE if small_pages else mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        os.makedirs(directory, exist_ok=True)
        self.copy()  # the first copy faults the pages in, and is not a measurement

    def copy(self) -> float:
        """Return the seconds of one warm ``memcpy`` of every tensor into the buffer, on one thread."""
        began = time.perf_counter()
        position = self._address
        for tensor in self._tensors:
            ctypes.memmove(position, tensor.data_ptr(), tensor.nbytes)
            position += tensor.nbytes
        return time.perf_counter() - began

    def write(self) -> float:
        """Return the seconds of an O_DIRECT write of the buffer to one new file, with fsync of the file and its
        directories.

        The previous file is deleted once the new one is durable, as with checkpoints: writing again to blocks that were
        just freed is faster on some devices, and no checkpoint can do that.
        """
        self._written += 1
        began = time.perf_counter()
        os.mkdir(os.path.dirname(self._path))
        fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o644)
        try:
            os.posix_fallocate(fd, 0, len(self._view))
            self._chunks(WRITE_THREADS, lambda offset, end: os.pwrite(fd, self._view[offset:end], offset), self.nbytes)
            os.ftruncate(fd, self.nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(os.path.dirname(self._path))
        sync_directory(self._directory)
        seconds = time.perf_counter() - began
        shutil.rmtree(self._folder(self._written - 1), ignore_errors=True)
        return seconds

    def read(self, files: Sequence[str] = ()) -> float:
        """Return the seconds of a cold O_DIRECT read, several requests deep, into the warm buffer. It reads what
        ``write`` wrote, or these files (as far as the buffer holds each), since some devices read some places faster
        than others."""
        paths = files or [self._path]
        for path in paths:
            drop_page_cache(path)
        began = time.perf_counter()
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                self._chunks(
                    READ_THREADS,
                    functools.partial(self._read_chunk, fd),
                    min(os.path.getsize(path), self.nbytes),
                )
            finally:
                os.close(fd)
        return time.perf_counter() - began

    def _read_chunk(self, fd: int, offset: int, end: int) -> int:
        return os.preadv(fd, [self._view[offset:end]], offset)

    def close(self) -> None:
        """Remove the file. The memory goes with the object."""
        shutil.rmtree(self._folder(self._written), ignore_errors=True)

    @property
    def _path(self) -> str:
        return os.path.join(self._folder(self._written), "raw.bin")

    def _folder(self, number: int) -> str:
        return os.path.join(self._directory, f"raw-{number:08d}")

    def _chunks(self, threads: int, move: Callable[[int, int], int], nbytes: int) -> None:
        total = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        offsets = itertools.count(0, CHUNK_BYTES)  # ``next`` on it is atomic under the GIL
        errors: list[Exception] = []

        def work() -> None:
            try:
                for offset in offsets:
                    if offset >= total:
                        return
                    end = min(offset + CHUNK_BYTES, total)
                    moved = move(offset, end)
                    if offset + moved < min(end, nbytes):
                        raise OSError(f"moved {moved} of {end - offset} bytes at {offset}")
            except Exception as error:
                errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_page_cache(path: str) -> None:
    """Ask the kernel to forget a file's cached pages, or those of every file below a directory."""
    files = [path] if os.path.isfile(path) else [os.path.join(at, f) for at, _, names in os.walk(path) for f in names]
    for file in files:
        try:
            fd = os.open(file, os.O_RDONLY)
        except FileNotFoundError:  # it has got its name meanwhile, or is gone
            continue
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
