"""The doctor's speed tests, bounded in time and bytes, and what it recommends from them."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncckpt.doctor import Report, Speeds, examine
from asyncckpt.doctor.advice import Seen, recommend, writers
from asyncckpt.doctor.ops import DoctorOps
from asyncckpt.testing import ThrottledOps
from asyncckpt.types import Buffer


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path("/dev/shm", f"asyncckpt-test-doctor-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def settings(report: Report) -> dict[str, Any]:
    return {one.name: one.value for one in report.settings}


class Slow(ThrottledOps, DoctorOps):
    """A disk of few bytes a second; remembers how large files became."""

    most = 0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        done = super().pwrite(fd, data, offset)
        self.most = max(self.most, offset + done)
        return done


def test_a_slow_disk_is_measured_in_bounded_time_and_gets_a_codec(memory: Path) -> None:
    slow = Slow(20e6)
    began = time.monotonic()
    report = examine(memory, seconds=1.6, max_bytes=64 << 20, ops=slow)
    assert time.monotonic() - began < 12, "a pass is cut off by time, not by bytes"
    assert slow.most < 32 << 20
    assert 5e6 < max((report.speeds.direct or report.speeds.buffered).values()) < 30e6
    assert settings(report)["codec"] == "auto"
    assert settings(report)["threads"] == 1, "more threads bring nothing"


class Watching(DoctorOps):
    """Knows how much lay on the disk at one time, and says how much is free."""

    def __init__(self, folder: Path, free_bytes: int) -> None:
        self._folder, self._free_bytes, self.largest = folder, free_bytes, 0

    def statvfs(self, path: str) -> Any:
        return SimpleNamespace(f_bavail=self._free_bytes, f_frsize=1, f_blocks=1, f_files=0, f_favail=0)

    def truncate(self, fd: int, nbytes: int) -> None:
        super().truncate(fd, nbytes)
        files = next(self._folder.iterdir()).iterdir()
        self.largest = max(self.largest, sum(entry.stat().st_blocks * 512 for entry in files))


@pytest.mark.parametrize("free_bytes", [1 << 40, 80 << 20])
def test_bytes_on_the_disk_are_bounded(memory: Path, free_bytes: int) -> None:
    """By what was asked for, and by a share of what is free."""
    watching = Watching(memory, free_bytes)
    examine(memory, seconds=20, max_bytes=(4 if free_bytes == 1 << 40 else 256) << 20, ops=watching)
    assert 4 << 20 <= watching.largest < 5 << 20


def test_a_disk_that_slows_down_does_not_make_it_longer(memory: Path) -> None:
    """A cache that takes the first bytes at once: the pace that they promised does not last."""

    class Bursting(DoctorOps):
        left = 64 << 20
        never = threading.Event()

        def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
            self.left -= memoryview(data).nbytes
            if self.left < 0 and memoryview(data).nbytes > 4096:
                self.never.wait(0.4)
            return super().pwrite(fd, data, offset)

    began = time.monotonic()
    examine(memory, seconds=2, max_bytes=512 << 20, ops=Bursting())
    assert time.monotonic() - began < 10


def test_an_interrupt_stops_the_writers(memory: Path) -> None:
    """Ctrl-C reaches the main thread, which waits for them."""

    class Signalling(DoctorOps):
        big = 0
        never = threading.Event()

        def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
            if memoryview(data).nbytes > 4 << 20:
                self.big += 1
                if self.big == 3:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                self.never.wait(0.1 if self.big >= 3 else 0)
            return super().pwrite(fd, data, offset)

    ops = Signalling()
    with pytest.raises(KeyboardInterrupt):
        examine(memory, seconds=80, max_bytes=512 << 20, ops=ops)
    assert ops.big < 16, "nothing more is begun"
    assert os.listdir(memory) == []


def _seen(speeds: Speeds, **changes: Any) -> Seen:
    values: dict[str, Any] = {"remote": False, "direct": True, "largest_file_bytes": 1 << 62, "cores": 8}
    return Seen((), speeds, **values | changes)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (_seen(Speeds()), {"codec": "none", "threads": 3, "direct": True, "read_back": False, "shard_bytes": 4 << 30}),
        (_seen(Speeds({1: 1e9, 2: 1.05e9}, {1: 1e9}, encoding=4e8)), {"threads": 1, "codec": "none"}),
        (_seen(Speeds({1: 1e9, 2: 1.9e9, 4: 2e9}, {1: 1e9}, encoding=4e8)), {"threads": 2, "codec": "none"}),
        (_seen(Speeds({1: 1e8, 2: 2e8}, {1: 1e8}, encoding=4e8)), {"threads": 2, "codec": "auto"}),
        (_seen(Speeds({1: 6e8, 2: 1e9}, {1: 1e8}, encoding=6e8), cores=1), {"threads": 2, "codec": "none"}),
        (_seen(Speeds({1: 1e8}, {1: 3e8, 2: 3e8}, encoding=1)), {"direct": False, "threads": 1}),
        (_seen(Speeds({}, {1: 3e8}), direct=False), {"direct": False}),
        (_seen(Speeds(), largest_file_bytes=3 << 30), {"shard_bytes": 2 << 30}),
        (_seen(Speeds(), missing_parents=True), {"create_parents": True}),
    ],
)
def test_recommendations(seen: Seen, expected: dict[str, Any]) -> None:
    found = {one.name: one.value for one in recommend(seen)}
    assert {name: found[name] for name in expected} == expected
    assert ("create_parents" in found) == seen.missing_parents


def test_the_fewest_threads_that_come_close_are_enough() -> None:
    assert writers({1: 50.0, 2: 95.0, 4: 100.0, 8: 99.0}) == 2
    assert writers({}) == 3
