"""A save that takes too long, is interrupted or fails publishes nothing, and says why."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.committing import STATE, checkpointer, drain

from asyncckpt import ArenaBusy, Checkpointer, KeepLast, SaveAbandoned, SaveFailed, WriterOptions
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import FaultyOps, GatedOps, InterceptedOps


class Between(InterceptedOps):
    """Calls ``then`` right before an operation, where ``when`` holds for its arguments; once."""

    def __init__(self, operation: str, then: Callable[[], object], when: Callable[..., bool] = lambda *_: True) -> None:
        self.operation, self.then, self.when = operation, then, when
        self.called = False

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == self.operation and not self.called and self.when(*args):
            self.called = True
            self.then()
        return args


def attempts(run: Checkpointer) -> list[str]:
    return [name for name in os.listdir(run.path) if name.startswith(".tmp-")]


def test_a_save_that_would_wait_too_long_for_the_one_before_says_so(tmp_path: Path) -> None:
    ops = GatedOps()
    run = checkpointer(tmp_path, ops, max_in_flight=1, stall_timeout_seconds=0.2)
    pending = run.save(2, STATE)
    with pytest.raises(ArenaBusy, match=r"step 3: earlier saves \(steps 2\) still not durable after 0 s"):
        run.save(3, STATE)
    ops.gate.set()
    pending.result()
    run.save(3, STATE).result()
    run.close()


def test_a_save_past_its_deadline_is_given_up_and_its_attempt_removed(tmp_path: Path) -> None:
    ops = GatedOps()
    run = checkpointer(tmp_path, ops, writer=WriterOptions(durable_timeout_seconds=0.3))
    pending = run.save(2, STATE)
    with pytest.raises(SaveAbandoned, match=r"step 2: not durable after 0 s.*Check the storage"):
        pending.result(20)
    ops.gate.set()
    drain(run)
    assert attempts(run) == []
    run.save(3, STATE).result()
    assert [entry.step for entry in run.ls()] == [1, 3]
    run.close()


def test_of_several_failed_saves_the_oldest_is_raised_and_the_others_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(PosixOps):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            raise OSError(errno.EIO, "broken")

    run = checkpointer(tmp_path, Broken())
    saves = [run.save(2, STATE), run.save(3, STATE)]
    for pending in saves:
        while not pending.done():
            pending._wait(0.1)
    with pytest.raises(SaveFailed, match="step 2") as caught:
        run.close()
    assert "a further save failed too: step 3" in caplog.text
    assert any("step 3" in note for note in caught.value.__notes__), "the caller is told of both"


def test_an_interrupt_in_the_committer_is_not_dressed_up(tmp_path: Path) -> None:
    class Interrupted(PosixOps):
        def rename_noreplace(self, source: str, target: str) -> None:
            raise SystemExit(3)

    run = checkpointer(tmp_path, Interrupted())
    with pytest.raises(SystemExit):
        run.save(2, STATE).result()
    run._store.ops = PosixOps()
    assert attempts(run) == []
    run.save(2, STATE).result()
    run.close()


def test_a_save_that_is_poisoned_after_its_manifest_is_not_published(tmp_path: Path) -> None:
    run = checkpointer(tmp_path, PosixOps())

    def poison() -> None:
        (flight,) = run._in_flight.all()
        flight.save.scope.fail(SaveFailed("poisoned late"))

    run._store.ops = Between("write_file", poison, lambda path, _data: path.endswith("manifest.json"))
    with pytest.raises(SaveFailed, match="poisoned late"):
        run.save(2, STATE).result()
    assert [entry.step for entry in run.ls()] == [1]
    assert attempts(run) == []
    run.close()


def test_a_save_that_is_poisoned_before_it_has_a_directory_makes_none(tmp_path: Path) -> None:
    run = checkpointer(tmp_path, PosixOps())
    free = run._store.free_bytes

    def poison() -> int:
        (flight,) = run._in_flight.all()
        flight.save.scope.fail(SaveFailed("poisoned early"))
        return free()

    entered = threading.Event()

    def slow() -> int:
        entered.set()
        return poison()

    run._store.free_bytes = slow  # type: ignore[method-assign]
    pending = run.save(2, STATE)
    with pytest.raises(SaveFailed, match="poisoned early"):
        pending.result()
    assert entered.is_set()
    drain(run)
    assert attempts(run) == []
    run._store.free_bytes = free  # type: ignore[method-assign]
    run.save(3, STATE).result()
    run.close()


def test_giving_an_attempt_up_does_not_wait_for_storage_that_hangs(tmp_path: Path) -> None:
    run = checkpointer(tmp_path, PosixOps())
    hangs, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert go_on.wait(30)

    run._store.ops = Between("mkdir", hang)
    pending = run.save(2, STATE)
    assert hangs.wait(10)
    (flight,) = run._in_flight.all()
    flight.save.scope.fail(SaveFailed("given up"))
    began = time.monotonic()
    flight.save.discard(0.05)
    assert time.monotonic() - began < 5
    go_on.set()
    with pytest.raises(SaveFailed, match="given up"):
        pending.result()
    drain(run)
    assert attempts(run) == []
    run.close()


def test_an_attempt_that_others_may_be_about_to_publish_is_let_go_and_not_removed(tmp_path: Path) -> None:
    """As the ranks of a job do, which cannot know whether rank 0 gave up."""
    run = checkpointer(tmp_path, PosixOps())
    left: list[list[str]] = []

    def let_go() -> None:
        (flight,) = run._in_flight.all()
        flight.save.scope.fail(SaveFailed("rank 0 does not answer"))
        publisher = flight.save._publisher
        publisher.keeps_files = True  # type: ignore[misc]
        flight.save.discard(10.0)
        publisher.keeps_files = False  # type: ignore[misc]
        left.append([name for attempt in attempts(run) for name in os.listdir(tmp_path / "run" / attempt)])

    run._store.ops = Between("fsync_directory", let_go, lambda path: ".tmp-" in path)
    with pytest.raises(SaveFailed, match="rank 0 does not answer"):
        run.save(2, STATE).result()
    assert "state.json" in left[0]
    assert any(name.startswith("w-") for name in left[0])
    drain(run)
    assert attempts(run) == [], "this one is alone, and removes what it made"
    run.close()


def test_without_the_checkpoint_before_everything_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read cannot be taken over from; the save does not need it."""
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, STATE).result()
    with Checkpointer(tmp_path / "run") as run:
        run.prepare(STATE)

        def broken(*_: object) -> Any:
            raise OSError(errno.EIO, "cannot be read")

        opened = run._reuse._opened
        run._reuse._opened = broken  # type: ignore[method-assign]
        report = run.save(2, STATE).result()
        run._reuse._opened = opened  # type: ignore[method-assign]
        assert report.written_bytes >= STATE["w"].nbytes
        assert "nothing is taken over from the checkpoint before" in caplog.text
        assert run.verify(2) == []


def test_a_damaged_checkpoint_that_somebody_took_away_is_simply_saved_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", writer=WriterOptions(reuse_unchanged=False)) as run:
        for step in (1, 2):
            run.save(step, STATE).result()
    shard = next((tmp_path / "run" / "step-00000002").glob("w-*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with Checkpointer(tmp_path / "run") as run:
        with pytest.warns(RuntimeWarning, match="step-00000002 cannot be used"):
            assert run.resume({"w": STATE["w"].clone()}) == 1
        shutil.rmtree(shard.parent)
        run.save(2, STATE).result()
        assert run.verify(2) == []
    assert not list((tmp_path / "run").glob(".damaged-*"))


def test_what_fails_after_the_acknowledgement_is_logged_and_takes_nothing_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ops = FaultyOps()
    run = checkpointer(tmp_path, ops, keep=KeepLast(1))
    drain(run)
    ops.fail = ("rename_noreplace", 2, errno.EIO)  # the first publishes, the second is retention's
    run.save(2, STATE).result()
    drain(run)
    assert "step 2 is durable, but tidying up after it failed" in caplog.text
    assert [entry.step for entry in run.ls()] == [1, 2]
    assert [entry.step for entry in run.prune(dry_run=True)] == [1]
    assert [entry.step for entry in run.ls()] == [1, 2]
    run.save(3, STATE).result()
    drain(run)
    assert [entry.step for entry in run.ls()] == [3]
    run.close()
