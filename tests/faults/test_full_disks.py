"""Disks, inodes, file sizes and descriptors that run out at every place of a save; disks that turn read-only in one.

What was acknowledged stays; the error is typed and says where, which step, and the way out; nothing stays behind; and
once there is room again the same ``Checkpointer`` goes on.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loop_mounts import Ext4, ext4, resize, tmpfs, used_blocks, used_inodes
from support.scenarios import SCENARIOS, Scenario, check_visible, fork, leftovers, open_files, state_of

from asyncckpt import AsyncCkptError, Checkpointer, LeaseLost, NotEnoughSpace, SaveFailed
from asyncckpt.testing import READING, InterceptedOps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits as on Linux")

BOTH = [SCENARIOS["safetensors"], SCENARIOS["zarr"]]
WAYS_OUT = ("free space", "raise the limit", "remount it", "Check the storage")
#: Sizes in a row at which the save must succeed before a sweep ends.
_ENOUGH = 3


def _hopeful(run: Checkpointer) -> Checkpointer:
    """The estimate before a save says that all is well, as where another writer takes the rest meanwhile."""
    run._store.free_bytes = lambda: 1 << 40  # type: ignore[method-assign]
    return run


def _drained(run: Checkpointer) -> None:
    done = threading.Event()
    run._committer._pool.submit(done.set)
    assert done.wait(30)


def _save(run: Checkpointer, generation: int) -> BaseException | None:
    """The error of a save that has come to its end, or None where it is durable."""
    try:
        error = run.save(generation, state_of(generation)).exception(30)
    except AsyncCkptError as raised:
        error = raised
    _drained(run)
    return error


def _check_error(error: BaseException, run: Checkpointer, wanted: type[BaseException]) -> None:
    text = str(error)
    assert isinstance(error, wanted), f"untyped: {error!r}"
    assert not isinstance(error, LeaseLost), f"nobody took the directory over: {error!r}"
    assert "step 2" in text
    assert str(run.path) in text
    assert any(way in text for way in ("free space", "raise the limit", "remount it", "Check the storage")), (
        f"no way out: {text}"
    )


class _Sweep:
    """One file system that is squeezed around the second save of run after run."""

    def __init__(self, disk: Path, scenario: Scenario, squeeze: Callable[[int], None], relax: Callable[[], None]):
        self.disk = disk
        self.scenario = scenario
        self.squeeze = squeeze
        self.relax = relax
        self.failures = self.successes = 0

    def run(self, most: int, stride: int = 1) -> None:
        """From nothing left to just enough."""
        for extra in range(0, most, stride):
            self.failures, self.successes = self._once(extra)
            if self.successes == _ENOUGH:
                return
        raise AssertionError(f"the save still fails with {most} more")

    def _once(self, extra: int) -> tuple[int, int]:
        path = self.disk / "run"
        run = _hopeful(self.scenario.checkpointer(path, keep=()))
        try:
            assert _save(run, 1) is None
            self.squeeze(extra)
            error = _save(run, 2)
            if error is not None:
                _check_error(error, run, NotEnoughSpace)
                assert not leftovers(path), f"with {extra} more: {leftovers(path)}"
            durable = {1: 1} if error is not None else {1: 1, 2: 2}
            assert check_visible(path) == durable, f"with {extra} more"
            self.relax()
            assert _save(run, 3) is None, "there is room again"
            assert check_visible(path) == durable | {3: 3}
        finally:
            self.relax()
            run.close()
        assert not leftovers(path)
        shutil.rmtree(path)
        return (self.failures, self.successes + 1) if error is None else (self.failures + 1, 0)


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("scenario", BOTH, ids=str)
def test_a_disk_that_is_full_after_any_block_of_a_save(scenario: Scenario, stride: int, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        squeeze = lambda extra: resize(disk, lambda: f"size={(used_blocks(disk) + extra) * 4096}")  # noqa: E731
        sweep = _Sweep(disk, scenario, squeeze, lambda: resize(disk, lambda: "size=64m"))
        sweep.run(400, stride)
    assert sweep.failures > 60 // stride
    print(f"{scenario}: full at each of {sweep.failures} blocks")


@pytest.mark.parametrize("scenario", BOTH, ids=str)
def test_a_disk_without_inodes_at_any_file_of_a_save(scenario: Scenario, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=64m,nr_inodes=1000") as disk:
        squeeze = lambda extra: resize(disk, lambda: f"nr_inodes={used_inodes(disk) + extra}")  # noqa: E731
        sweep = _Sweep(disk, scenario, squeeze, lambda: resize(disk, lambda: "nr_inodes=1000"))
        sweep.run(100)
    assert sweep.failures > 5
    print(f"{scenario}: no inode for each of {sweep.failures} files")


def _limited(path: Path, scenario: Scenario, what: int, limits: Callable[[], Iterator[int]]) -> None:
    """In a child: saves under one soft limit after the other; what they leave, and what comes after each."""

    def child(_pipe: int) -> None:
        hard = resource.getrlimit(what)
        failures = successes = 0
        for number, limit in enumerate(limits()):
            run = scenario.checkpointer(path / str(number), keep=())
            assert _save(run, 1) is None
            before = open_files()
            resource.setrlimit(what, (limit if what == resource.RLIMIT_FSIZE else len(before) + limit, hard[1]))
            try:
                error = _save(run, 2)
            finally:
                resource.setrlimit(what, hard)
            if error is not None:
                _check_error(error, run, SaveFailed)
            durable = {1: 1} if error is not None else {1: 1, 2: 2}
            assert check_visible(path / str(number)) == durable, f"limit {limit}"
            assert _save(run, 3) is None
            assert check_visible(path / str(number)) == durable | {3: 3}
            failures, successes = failures + (error is not None), successes + (error is None)
            del error  # its traceback may hold an event loop that was half made
            if set(open_files().values()) - set(before.values()):
                gc.collect()
            left = set(open_files().values()) - set(before.values())
            assert not left, f"limit {limit}: left open: {left}"
            run.close()
            with scenario.checkpointer(path / str(number)) as after:  # what was left is the next run's to delete
                after.prepare(state_of(0))
            assert not leftovers(path / str(number))
        assert failures > 3
        assert successes > 0

    pid, pipe = fork(child)
    os.close(pipe)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "see the child's traceback"


@pytest.fixture
def imported(tmp_path: Path) -> None:
    """What a save imports is imported before descriptors run out."""
    for scenario in BOTH:
        with scenario.checkpointer(tmp_path / f"warm-{scenario}") as run:
            run.save(1, state_of(1)).result()


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("scenario", BOTH, ids=str)
def test_files_that_may_not_grow_further(scenario: Scenario, tmp_path: Path) -> None:
    """Python ignores SIGXFSZ: the write fails, or is short."""
    limits = [0, 1, 100, 512, 4095, 4096, 20_000, 80_000, 159_999, 200_000, 279_999, 1 << 20]
    _limited(tmp_path, scenario, resource.RLIMIT_FSIZE, lambda: iter(limits))


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("scenario", BOTH, ids=str)
def test_a_process_that_runs_out_of_descriptors(scenario: Scenario, tmp_path: Path) -> None:
    _limited(tmp_path, scenario, resource.RLIMIT_NOFILE, lambda: iter([0, 1, 2, 3, 4, 6, 8, 11, 14, 90]))


class _TurnsReadOnly(InterceptedOps):
    """The disk fails before change number ``number``, of any thread."""

    def __init__(self, disk: Ext4, number: int) -> None:
        self.disk = disk
        self.number = number
        self.failed = False
        self._lock = threading.Lock()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name not in READING:
            with self._lock:
                self.number -= 1
                if self.number == 0:
                    self.disk.fail()
                    self.failed = True
        return args


@pytest.mark.parametrize("scenario", BOTH, ids=str)
def test_a_disk_that_turns_read_only_in_the_middle_of_a_save(scenario: Scenario, tmp_path: Path) -> None:
    met = 0
    for number in (1, 4, 9, 14, 19, 24, 29, 34):
        folder = tmp_path / str(number)
        folder.mkdir()
        with ext4(folder) as disk:
            path = disk.path / "run"
            run = scenario.checkpointer(path, keep=())
            assert _save(run, 1) is None
            ops = run._store.ops = _TurnsReadOnly(disk, number)
            error = _save(run, 2)
            if ops.failed and error is not None:
                met += 1
                _check_error(error, run, SaveFailed)
                assert isinstance(error.__cause__, OSError)
                assert error.__cause__.errno in (errno.EROFS, errno.EIO)
                assert (third := _save(run, 3)) is not None, "nothing can be saved on a disk that is read-only"
                assert isinstance(third, SaveFailed)
            assert check_visible(path)[1] == 1
            run.close()
    assert met > 3
