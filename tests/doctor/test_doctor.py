"""``asyncckpt doctor``: what it says, that what it recommends runs, and that it leaves nothing behind, ever."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import Checkpointer, InvalidOption, RunLocked, RunPathError
from asyncckpt.cli.app import app
from asyncckpt.doctor import Finding, Report, examine
from asyncckpt.doctor.ops import DoctorOps
from asyncckpt.doctor.scratch import PREFIX, Scratch
from asyncckpt.doctor.system import System
from asyncckpt.storage.local import LocalStore

QUICK: dict[str, Any] = {"seconds": 0, "max_bytes": 1 << 20}


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path("/dev/shm", f"asyncckpt-test-doctor-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def by_check(report: Report) -> dict[str, Finding]:
    return {one.check: one for one in report.findings}


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_recommended_lines_run_and_save(tmp_path: Path) -> None:
    report = examine(tmp_path / "deep" / "run", seconds=0.4, max_bytes=16 << 20)
    assert report.examined == str(tmp_path)
    assert set(os.listdir(tmp_path)) == set()
    names: dict[str, Any] = {}
    exec(report.code(), names)
    state = {"weights": torch.arange(1000.0), "step": 7}
    with names["checkpointer"] as run:
        assert run.path == str(tmp_path / "deep" / "run")
        run.save(1, state).result()
        loaded = run.load_tensors(1, ["weights.value"])["weights.value"]
    assert torch.equal(loaded, state["weights"])
    assert all(one.reason for one in report.settings)


def test_every_speed_is_measured(tmp_path: Path) -> None:
    seen: list[Finding] = []
    report = examine(tmp_path, seconds=0.8, max_bytes=32 << 20, on_finding=seen.append)
    assert tuple(seen) == report.findings, "told one after the other, and all"
    speeds = report.speeds
    assert speeds.read > 0
    assert speeds.encoding > 1e6
    assert speeds.publish_seconds > 0
    assert speeds.fsync_seconds > 0
    assert all(rate > 0 for rate in [*speeds.direct.values(), *speeds.buffered.values()])
    assert (1 in speeds.direct) == (by_check(report)["O_DIRECT"].status == "good")
    assert "O_DIRECT" in by_check(report)["speed"].seen or not speeds.direct


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunPathError, match="no directory"):
        examine(tmp_path / "file" / "run")
    for wrong in ({"seconds": -1}, {"seconds": float("nan")}, {"max_bytes": 10}):
        with pytest.raises(InvalidOption):
            examine(tmp_path, **wrong)


# -- what it leaves ----------------------------------------------------------------------------------------------------


class Interrupted(DoctorOps):
    """Ctrl-C after the ``number``-th call (of ``only``), once."""

    def __init__(self, number: int, only: str = "") -> None:
        calls = itertools.count(1)
        self.reached = False

        def watched(honest: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                result = honest(*arguments)
                if next(calls) == number:
                    self.reached = True
                    raise KeyboardInterrupt
                return result

            return call

        for name in dir(DoctorOps):
            if not name.startswith("_") and name != "write_file" and only in ("", name):
                setattr(self, name, watched(getattr(super(), name)))
        self.lock_elsewhere = lambda path, kind: False  # type: ignore[method-assign]


def test_an_interrupt_at_any_call_leaves_nothing(memory: Path) -> None:
    for number in itertools.count(1):
        ops = Interrupted(number)
        if number > 1:
            assert os.listdir(memory) == []
        try:
            examine(memory, ops=ops, **QUICK)
        except KeyboardInterrupt:
            continue
        if not ops.reached:
            break
    assert number > 150, "every call was interrupted"
    assert os.listdir(memory) == []


@pytest.mark.parametrize(
    ("call", "number"),
    [("reserve", 1), ("pwrite", 45), ("pwrite", 60), ("truncate", 2), ("drop_cache", 1), ("preadv", 3)],
)
def test_an_interrupt_while_speed_is_measured_leaves_nothing(memory: Path, call: str, number: int) -> None:
    ops = Interrupted(number, call)
    with pytest.raises(KeyboardInterrupt):
        examine(memory, ops=ops, seconds=4, max_bytes=64 << 20)
    assert ops.reached
    assert os.listdir(memory) == []
    assert not [one for one in threading.enumerate() if one.name.startswith("asyncckpt-doctor")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    (tmp_path / "mine").write_text("kept")
    command = [sys.executable, "-c", "from asyncckpt.cli import main; main()", "doctor", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, "--seconds", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "largest file" in line:  # what comes next is written for minutes
                break
        assert any(name.startswith(PREFIX) for name in os.listdir(tmp_path))
        running.send_signal(number)
        running.send_signal(number)  # an impatient user
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["mine"]


def test_what_a_killed_doctor_left_goes_with_the_next(tmp_path: Path) -> None:
    ours = {name: f"{PREFIX}{str(n) * 32}" for n, name in enumerate(("dead", "dead-early", "alive", "young"))}
    for name, called in {**ours, "not-ours": ".tmp-00000001-x", "a user's": f"{PREFIX}notes"}.items():
        folder = tmp_path / called
        folder.mkdir()
        if name != "dead-early":
            (folder / "in-use").touch()
        (folder / "speed").write_bytes(bytes(5))
        if name != "young":
            os.utime(folder, (1, 1))
    alive = os.open(tmp_path / ours["alive"] / "in-use", os.O_RDWR)
    DoctorOps().lock_whole(alive)
    examine(tmp_path, **QUICK)
    os.close(alive)
    assert set(os.listdir(tmp_path)) == {".tmp-00000001-x", f"{PREFIX}notes", ours["alive"], ours["young"]}


def test_a_run_that_begins_deletes_what_a_killed_doctor_left(tmp_path: Path) -> None:
    dead = tmp_path / "run" / f"{PREFIX}{'d' * 32}"
    dead.mkdir(parents=True)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"w": torch.zeros(3)}).result()
    assert not dead.exists()


def test_what_cannot_be_deleted_is_said(memory: Path) -> None:
    class Stuck(DoctorOps):
        def rmdir(self, path: str) -> None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    finding = by_check(examine(memory, ops=Stuck(), **QUICK))["clean-up"]
    assert finding.status == "warning"
    assert PREFIX in finding.seen


def _inodes(path: Path) -> dict[str, int]:
    """Of what stays: checkpoints and the lock."""
    kept = [name for name in os.listdir(path) if name.startswith("step-") or name.endswith(".lock")]
    return {name: (path / name).lstat().st_ino for name in kept}


def test_a_live_run_is_neither_stopped_nor_changed(tmp_path: Path) -> None:
    path, state = tmp_path / "run", {"w": torch.arange(50_000.0)}
    with Checkpointer(path) as run:
        run.save(1, state).result()
        before = _inodes(path)
        stop = threading.Event()
        examined: list[Report] = []
        doctor = threading.Thread(target=lambda: (examined.append(examine(path, seconds=0.5)), stop.set()))
        doctor.start()
        step = 1
        while not stop.is_set():
            step += 1
            run.save(step, state).result()
        doctor.join()
        assert step > 1
        assert all(not run.verify(one) for one in (1, step))
        assert by_check(examined[0])["run"].seen.startswith(f"in use by host {os.uname().nodename}, pid {os.getpid()}")
        assert run.save(step + 1, state).result().step == step + 1, "the lease was not lost"
    assert len(before) == 2
    assert before.items() <= _inodes(path).items()
    assert not [name for name in os.listdir(path) if name.startswith(".tmp-")]


def test_a_run_that_begins_meanwhile_is_said_and_not_mistaken_for_a_bad_disk(memory: Path) -> None:
    class Begins(DoctorOps):
        def exchange(self, first: str, second: str) -> None:
            LocalStore(str(memory)).reclaim()
            super().exchange(first, second)

    with pytest.raises(RunLocked, match="a run began here"):
        examine(memory, ops=Begins(), **QUICK)
    assert os.listdir(memory) == []


def test_a_lock_file_that_somebody_planted_is_not_waited_for(memory: Path) -> None:
    planted = memory / f"{PREFIX}planted"
    planted.mkdir()
    os.mkfifo(planted / "in-use")
    os.utime(planted, (1, 1))
    with Scratch(str(memory), DoctorOps()) as scratch:
        assert os.path.isdir(scratch.path)
    assert not scratch.left_behind


# -- the command -------------------------------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments, "--seconds", "0"])


def test_the_command_exits_with_1_where_checkpoints_are_unsafe(tmp_path: Path, memory: Path) -> None:
    result = call(str(memory))
    assert result.exit_code == 1
    assert "this is memory" in result.stdout
    assert "do not save checkpoints" in result.stdout
    mount = System().mount(str(tmp_path))
    if mount is not None and not mount.in_memory:
        result = call(str(tmp_path))
        assert result.exit_code == 0, result.output
        assert "from asyncckpt import Checkpointer" in result.stdout


def test_json_is_all_that_is_printed(memory: Path) -> None:
    result = call(str(memory), "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["unsafe"] is True
    assert {one["check"]: one["status"] for one in found["findings"]}["file system"] == "unsafe"
    assert {one["name"] for one in found["recommended"]} >= {"format", "codec", "threads", "direct", "shard_bytes"}
    compile(found["code"], "recommended", "exec")


def test_failures_are_a_line_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, code in (([str(tmp_path / "file")], 5), ([str(tmp_path), "--max-bytes", "1"], 2), ([], 2)):
        result = call(*arguments)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output


def test_the_signal_handlers_of_the_caller_come_back(memory: Path) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    call(str(memory), "--json")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
