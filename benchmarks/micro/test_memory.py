"""What should the arena be made of? ``pytest benchmarks/micro/test_memory.py -m bench`` (docs/design/001-arena.md).

Each kind of memory is touched for the first time, copied into when it is warm, and written from with O_DIRECT to the
directory of pytest's temporary files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.bench

NBYTES = 256 << 20
ROUNDS = 15
_EXTENT_BYTES = 8 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14 and newer; mmap has no name for it


def shared() -> mmap.mmap:
    """Map a ``memfd``, which another process could map too. It is in 4 KiB pages where ``shmem_enabled`` is never."""
    fd = os.memfd_create("benchmark")
    try:
        os.ftruncate(fd, NBYTES)
        return mmap.mmap(fd, NBYTES)
    finally:
        os.close(fd)


def small_pages() -> mmap.mmap:
    memory = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def huge_pages() -> mmap.mmap:
    memory = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def touch(memory: mmap.mmap) -> None:
    memory.madvise(_MADV_POPULATE_WRITE)


KINDS: dict[str, Callable[[], mmap.mmap]] = {
    "memfd": shared,
    "anonymous, 4 KiB pages": small_pages,
    "anonymous, huge pages": huge_pages,
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def record_throughput(benchmark: BenchmarkFixture) -> None:
    if benchmark.stats is not None:  # there are none with --benchmark-disable
        stats = benchmark.stats.stats
        for name, seconds in (("median", stats.median), ("slowest", stats.max), ("fastest", stats.min)):
            benchmark.extra_info[f"{name}_gb_per_second"] = round(NBYTES / seconds / 1e9, 2)


@each_kind
@pytest.mark.benchmark(group="first touch of 256 MiB")
def test_first_touch(benchmark: BenchmarkFixture, make: Callable[[], mmap.mmap]) -> None:
    benchmark.pedantic(touch, setup=lambda: ((make(),), {}), rounds=ROUNDS)  # type: ignore[no-untyped-call]
    record_throughput(benchmark)


@each_kind
@pytest.mark.benchmark(group="warm copy of 256 MiB")
def test_copy(benchmark: BenchmarkFixture, make: Callable[[], mmap.mmap]) -> None:
    memory, source = make(), np.ones(NBYTES, np.uint8)
    touch(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    benchmark.pedantic(ctypes.memmove, args=(address, source.ctypes.data, NBYTES), rounds=ROUNDS)  # type: ignore[no-untyped-call]
    record_throughput(benchmark)


@each_kind
@pytest.mark.benchmark(group="direct write of 256 MiB")
def test_write(benchmark: BenchmarkFixture, make: Callable[[], mmap.mmap], tmp_path: Path) -> None:
    memory = make()
    touch(memory)
    view = memoryview(memory)
    fd = os.open(tmp_path / "raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)

    def write(pool: ThreadPoolExecutor) -> None:
        offsets = range(0, NBYTES, _EXTENT_BYTES)
        list(pool.map(lambda offset: os.pwrite(fd, view[offset : offset + _EXTENT_BYTES], offset), offsets))

    try:
        os.posix_fallocate(fd, 0, NBYTES)
        with ThreadPoolExecutor(3) as pool:  # as many as a save has
            benchmark.pedantic(write, args=(pool,), rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]
    finally:
        os.close(fd)
    record_throughput(benchmark)
