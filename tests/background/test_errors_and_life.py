"""Errors of the background process come back as what they are, and it lives as long as it is of use."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.background import ForkedTrainer, background_pids, only_pid, until
from support.loop_mounts import resize, tmpfs

from asyncckpt import (
    Checkpointer,
    LeaseLost,
    NotEnoughSpace,
    Run,
    RunOptions,
    Safetensors,
    SaveFailed,
    WriterOptions,
)
from asyncckpt.background.failures import as_data, from_data
from asyncckpt.events import Committed, ExtentWritten, Written

ALWAYS = WriterOptions(process="always")


def _state(step: int, length: int = 700_000) -> dict[str, Any]:
    return {"w": torch.full((length,), float(step)), "meta": {"step": step}}


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_as_such_and_the_next_save_works_once_there_is_room(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        with Checkpointer(disk / "run", writer=ALWAYS) as run:
            run.save(1, _state(1)).result()
            error = run.save(2, _state(2, 1_500_000)).exception(30)
            assert isinstance(error, NotEnoughSpace), error
            resize(disk, lambda: "size=64m")
            run.save(3, _state(3, 1_500_000)).result(30)
        assert [entry.step for entry in Run(disk / "run").ls()] == [1, 3]
        assert not [one for one in os.listdir(disk / "run") if one.startswith((".tmp", ".trash"))]


def test_a_file_that_may_not_grow_says_what_to_raise(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", writer=ALWAYS) as run:
        run.save(1, _state(1)).result()
        process = only_pid()
        resource.prlimit(process, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        error = run.save(2, _state(2)).exception(30)
        assert isinstance(error, SaveFailed), error
        assert "step 2" in str(error)
        assert "ulimit -f" in str(error) or "SIGXFSZ" in str(error)
        assert [entry.step for entry in run.ls()] == [1]


def test_a_run_that_was_taken_over_publishes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Checkpointer(path, writer=ALWAYS) as run:
        run.save(1, _state(1)).result()
        with Checkpointer(path, run=RunOptions(takeover=True)) as other:
            other.save(2, _state(2)).result()
            error = run.save(3, _state(3)).exception(30)
            assert isinstance(error, LeaseLost), error
    assert [entry.step for entry in Run(path).ls()] == [1, 2]


def test_a_damaged_base_does_not_reach_the_next_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    state = {"still": torch.arange(300_000), "meta": {"step": 1}}
    with Checkpointer(path, writer=ALWAYS) as run:
        run.save(1, state).result()
        (shard,) = (path / "step-00000001").glob("still*.safetensors")
        shard.unlink()
        error = run.save(2, state).exception(30)
        assert error is None or isinstance(error, SaveFailed)
        run.save(3, state).result(30)
        assert run.verify(3) == []
        assert torch.equal(run.load(3)["still"], state["still"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "/run/x"),
        NotEnoughSpace("step 1: full"),
        LeaseLost("taken over"),
        ValueError("a value", 3),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
    ],
)
def test_errors_cross_as_what_they_are(error: BaseException) -> None:
    error.add_note("a note")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    crossed = from_data(as_data(error))
    assert type(crossed) is type(error)
    assert str(error) in str(crossed) or isinstance(error, UnicodeDecodeError)
    assert crossed.__notes__ == ["a note"]
    assert isinstance(crossed.__cause__, OSError)
    assert crossed.__cause__.errno == errno.ENOSPC


def test_errors_of_other_classes_name_their_class() -> None:
    class Odd(Exception):
        pass

    crossed = from_data(as_data(Odd("what")))
    assert isinstance(crossed, SaveFailed)
    assert "Odd" in str(crossed)


# -- what it reports -------------------------------------------------------------------------------------------------


def test_events_callbacks_and_log_lines_arrive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asyncckpt")
    heard: list[Any] = []
    files = Safetensors(extent_bytes=1 << 20)
    with Checkpointer(tmp_path / "run", writer=ALWAYS, files=files, on_event=heard.append) as run:
        called: list[int] = []
        pending = run.save(1, _state(1))
        pending.add_done_callback(lambda done: called.append(done.step))
        report = pending.result(30)
        until(lambda: called == [1])
        until(lambda: any(isinstance(event, Committed) for event in heard))
        until(lambda: sum(event.nbytes for event in heard if isinstance(event, ExtentWritten)) >= 2_800_000)
    assert [event.step for event in heard if isinstance(event, Written)] == [1]
    assert report.written_bytes >= 2_800_000
    assert 0 < report.durable_seconds < 30


# -- how long it lives -----------------------------------------------------------------------------------------------


def test_it_is_in_a_session_of_its_own_below_training_and_without_torch(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", writer=ALWAYS) as run:
        run.save(1, _state(1)).result()
        process = only_pid()
        assert os.getsid(process) == os.getpgid(process) == process
        assert os.getpriority(os.PRIO_PROCESS, process) > os.getpriority(os.PRIO_PROCESS, 0)
        assert "libtorch" not in Path(f"/proc/{process}/maps").read_text()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process, number)
        run.save(2, _state(2)).result(30)
        assert only_pid() == process
    until(lambda: not background_pids())


def test_it_works_where_torch_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ImportError('no torch here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    for number, files in enumerate(("safetensors", "zarr")):
        with Checkpointer(tmp_path / f"run{number}", writer=ALWAYS, files=files) as run:
            run.save(1, _state(1)).result(30)
            assert background_pids(), "threads have written"
            assert run.verify(1) == []


def _closes(run: Checkpointer) -> None:
    run.close()


def _leaves_by_itself(run: Checkpointer) -> None:
    run.save(2, _state(2))


def _forks_and_ends(run: Checkpointer) -> None:
    child = multiprocessing.get_context("fork").Process(target=os.getpid)
    child.start()
    child.join()
    run.save(2, _state(2)).result(30)
    run.close()


@pytest.mark.parametrize("leaving", [_closes, _forks_and_ends])
def test_it_ends_with_the_run(tmp_path: Path, leaving: Callable[[Checkpointer], None]) -> None:
    run = Checkpointer(tmp_path / "run", writer=ALWAYS)
    run.save(1, _state(1)).result()
    assert background_pids()
    leaving(run)
    until(lambda: not background_pids())
    run.close()


SCRIPT = """
import sys, torch
from asyncckpt import Checkpointer, WriterOptions
run = Checkpointer(sys.argv[1], writer=WriterOptions(process="always"))
run.save(1, {"w": torch.arange(700_000)}).result()
run.save(2, {"w": torch.arange(700_000) + 1})
sys.exit(int(sys.argv[2]))
"""


def test_it_ends_with_a_trainer_that_does_not_close(tmp_path: Path) -> None:
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "run"), "7"])
    assert child.wait(60) == 7
    until(lambda: not background_pids(child.pid))
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [1, 2]


def test_a_fork_that_outlives_a_killed_trainer_does_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def body(say: Callable[[str], None]) -> None:
        run = Checkpointer(path, writer=ALWAYS)
        run.save(1, _state(1)).result()
        child = os.fork()
        if child == 0:
            signal.pause()
        say(str(child))
        signal.pause()

    with ForkedTrainer(body) as trainer:
        child = int(trainer.hear())
        process = only_pid(trainer.pid)
        trainer.end(signal.SIGKILL)
        try:
            until(lambda: not background_pids(trainer.pid))
            with Checkpointer(path) as run:
                assert run.resume(_state(0)) == 1
        finally:
            os.kill(child, signal.SIGKILL)
    assert process
