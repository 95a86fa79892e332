"""What do many small files cost? ``pytest benchmarks/micro/test_small_files.py -m bench`` (docs/design/006-zarr.md).

Directories and files are synced as a save of many arrays syncs them, in pytest's temporary files.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest

from asyncckpt.memory.buffers import aligned_buffer
from benchmarks.harness.raw import sync_directory

pytestmark = pytest.mark.bench

DIRECTORIES = 598
FILES = 605
ROUNDS = 3
_EXTENT_BYTES = 8 << 20
_LARGE_BYTES = 1 << 30


def test_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds: dict[int, list[float]] = {1: [], 9: []}
    for number, threads in itertools.product(range(ROUNDS), seconds):
        folders = [tmp_path / f"{number}-{threads}-{at}" for at in range(DIRECTORIES)]
        for folder in folders:
            folder.mkdir()
            (folder / "zarr.json").touch()
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda folder: sync_directory(str(folder)), folders))
        seconds[threads].append(time.perf_counter() - began)
    _show(capsys, f"sync of {DIRECTORIES} directories", {f"{t} threads": found for t, found in seconds.items()})


def test_files_amid_large_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waited: dict[str, list[float]] = {"amid large writes": [], "after them": []}
    for number in range(ROUNDS):
        for when, found in waited.items():
            folder = tmp_path / f"{number} {when}"
            folder.mkdir()
            large = threading.Thread(target=_write_large, args=(folder / "large",))
            large.start()
            if when == "after them":
                large.join()
            found.append(_write_small(folder))
            large.join()
            (folder / "large").unlink()
    _show(capsys, f"fsyncs of {FILES} files by 8 threads, all threads together", waited)


def _write_large(path: Path) -> None:
    """Write a file in extents with O_DIRECT, as three writers of a save do."""
    data = memoryview(aligned_buffer(_EXTENT_BYTES))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    try:
        os.posix_fallocate(fd, 0, _LARGE_BYTES)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda offset: os.pwrite(fd, data, offset), range(0, _LARGE_BYTES, _EXTENT_BYTES)))
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_small(folder: Path) -> float:
    """Write and fsync small files on 8 threads; return the seconds inside fsync, of all threads together."""

    def write(number: int) -> float:
        fd = os.open(folder / f"small-{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.pwrite(fd, bytes(3072), 0)
            began = time.perf_counter()
            os.fsync(fd)
            return time.perf_counter() - began
        finally:
            os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(write, range(FILES)))


def _show(capsys: pytest.CaptureFixture[str], title: str, found: Mapping[str, Sequence[float]]) -> None:
    with capsys.disabled():
        print(f"\n{title}:")
        for name, seconds in found.items():
            print(f"  {name}: {median(seconds):.2f} s ({min(seconds):.2f}..{max(seconds):.2f})")
