"""The wall clock jumps by a day or ten years while a run saves: nothing is deleted, refused or chosen by its time."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scenarios import SCENARIOS, check_visible, generation_in, leftovers, state_of
from typer.testing import CliRunner

from asyncckpt import Checkpointer, KeepLast, Minutes, Run, RunLocked, WriterOptions
from asyncckpt.cli.app import app
from asyncckpt.storage import lease as lease_module
from asyncckpt.storage.lease import LEASE_FILE, Lease
from asyncckpt.testing import GatedOps, InterceptedOps
from asyncckpt.types import LeaseOptions

DAY, YEARS = 86_400.0, 10 * 365.25 * 86_400
#: Before 1970 too, where a clock without a battery may begin.
JUMPS = {"back a day": [-DAY], "on a day": [DAY], "back": [-YEARS], "on": [YEARS], "both": [YEARS, -7 * YEARS]}


class Clock:
    """The wall clock of this process. ``jump`` moves it; the monotonic clock goes on as it does."""

    def __init__(self) -> None:
        self._true = time.time
        self.offset = 0.0
        self.read = 0

    def jump(self, seconds: float) -> None:
        self.offset += seconds

    def now(self) -> float:
        self.read += 1
        return self._true() + self.offset


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock.now)
    return clock


class _Jumping(InterceptedOps):
    """The clock jumps at every operation of the store, each way in turn, and the times of what is there with it."""

    def __init__(self, clock: Clock, jumps: list[float], path: Path) -> None:
        self.clock = clock
        self.jumps = jumps
        self.path = path
        self.jumped = 0
        self._lock = threading.Lock()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with self._lock:
            self.clock.jump(self.jumps[self.jumped % len(self.jumps)] * (-1) ** (self.jumped // len(self.jumps)))
            self.jumped += 1
            if name == "fsync_directory":
                age(self.path, self.clock.now())
        return args


def age(path: Path, seconds: float) -> None:
    """Let everything below have been changed at that time."""
    for folder, folders, files in os.walk(path):
        for name in [*folders, *files]:
            try:
                os.utime(os.path.join(folder, name), (seconds, seconds))
            except FileNotFoundError:
                continue  # renamed meanwhile


@pytest.mark.parametrize(("scenario", "jumps"), [*(("links", jumps) for jumps in JUMPS), ("zarr", "both")])
def test_saves_and_retention_go_by_steps(scenario: str, jumps: str, clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with SCENARIOS[scenario].checkpointer(path, keep=KeepLast(2)) as run:
        run.prepare(state_of(0))
        ops = run._store.ops = _Jumping(clock, JUMPS[jumps], path)
        for generation in range(1, 5):
            clock.jump(JUMPS[jumps][0])
            run.save(generation, state_of(generation)).result()
            run.wait()
        entries = run.ls()
    assert ops.jumped > 40
    assert clock.read > 0
    assert check_visible(path) == {3: 3, 4: 4}
    assert max(abs(entry.created_unix_seconds - clock._true()) for entry in entries) > DAY / 2, "the clock did not jump"
    with SCENARIOS[scenario].checkpointer(path, keep=KeepLast(2)) as after:
        assert after.resume(state_of(0)) == 4
    assert not leftovers(path)


def test_the_newest_is_that_of_the_highest_step_and_not_of_the_latest_time(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with SCENARIOS["links"].checkpointer(path, keep=KeepLast(2)) as run:
        for generation in (1, 2, 3):
            run.save(generation, state_of(generation)).result()
            clock.jump(-YEARS)
        run.wait()
        assert [entry.step for entry in run.ls()] == [2, 3]
        assert run.ls()[0].created_unix_seconds > run.ls()[1].created_unix_seconds
    assert generation_in(Run(path), None) == 3
    result = CliRunner().invoke(app, ["prune", str(path), "--keep-last", "1"])
    assert result.exit_code == 0, result.output
    assert check_visible(path) == {3: 3}


def test_minutes_between_saves_are_not_those_of_the_wall_clock(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path / "run", every=Minutes(30)) as run:
        assert run.step(1, state_of(1)) is None
        for seconds in (YEARS, -2 * YEARS, DAY):
            clock.jump(seconds)
            assert run.step(2, state_of(2)) is None
        monotonic = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 31 * 60)
        assert run.step(3, state_of(3)) is not None
        monkeypatch.setattr(time, "monotonic", monotonic)


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[tuple[Checkpointer, GatedOps]]:
    """A run whose second save is in flight until its gate opens."""
    with Checkpointer(tmp_path / "run", writer=WriterOptions(reuse_unchanged=False)) as run:
        run.save(1, state_of(1)).result()
        run.wait()
        ops = run._store.ops = GatedOps()
        yield run, ops
        ops.gate.set()


@pytest.mark.parametrize("seconds", [YEARS, -YEARS, DAY, -DAY])
def test_an_attempt_that_looks_ancient_or_of_the_future_is_left_alone(
    seconds: float, clock: Clock, gated: tuple[Checkpointer, GatedOps], tmp_path: Path
) -> None:
    run, ops = gated
    path = tmp_path / "run"
    pending = run.save(2, state_of(2))
    clock.jump(seconds)
    age(path, clock.now() - seconds * 2)
    with pytest.raises(RunLocked):
        Checkpointer(path).prepare(state_of(0))
    assert CliRunner().invoke(app, ["prune", str(path), "--keep-last", "1", "--dry-run"]).exit_code == 0
    ops.gate.set()
    pending.result(30)
    assert check_visible(path) == {1: 1, 2: 2}


def test_what_a_dead_run_left_is_deleted_though_it_is_of_the_future(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with SCENARIOS["links"].checkpointer(path) as run:
        run.save(1, state_of(1)).result()
    for name in (f".tmp-00000002-{'01' * 16}", f".trash-step-00000000-{'01' * 16}"):
        (path / name).mkdir()
        (path / name / "shard").write_bytes(b"rest")
    age(path, clock.now() + YEARS)
    clock.jump(-YEARS)
    with SCENARIOS["links"].checkpointer(path) as after:
        assert after.resume(state_of(0)) == 1
    assert not leftovers(path)


def test_a_beating_holder_on_another_host_is_alive_whatever_the_time_is(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep, beats = time.sleep, iter(range(2, 1000))

    def beat(number: int) -> None:
        record = {"owner": "abc", "host": "node7", "boot": "node7:x", "pid": 4, "beat": number, "released": False}
        (tmp_path / LEASE_FILE).write_text(json.dumps(record))
        age(tmp_path, clock.now() - YEARS)

    def beating(seconds: float) -> None:
        clock.jump(YEARS)
        sleep(seconds)
        beat(next(beats))

    beat(1)
    monkeypatch.setattr(lease_module.time, "sleep", beating)
    with pytest.raises(RunLocked, match="host node7"):
        Lease.acquire(str(tmp_path), options=LeaseOptions(beat_seconds=0.05, ttl_seconds=0.5))
