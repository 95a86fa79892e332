"""Writers that are refused, writers that die, readers, ``verify --all`` and ``prune`` on one directory at once.

Nothing that was acknowledged is lost but to retention; nobody ever sees torn data, older data than was acknowledged, or
an error that is not typed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.scenarios import SCENARIOS, Scenario, check_visible, count, fork, generation_in, leftovers, state_of
from typer.testing import CliRunner

from asyncckpt import CheckpointNotFound, KeepLast, Run, RunLocked
from asyncckpt.catalog.listing import Listing
from asyncckpt.cli.app import app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork and SIGKILL as on Linux")

#: Saves before a writer gives the directory back for the other to have.
_TENURE = 25
_LOCKED, _NOT_FOUND = 4, 3
#: What has to have happened more often than this for a crowd's life to show something.
_LEAST = {"killed": 2, "refused": 5, "read": 5, "verified": 1, "prune 4": 1}
#: How much longer than asked for a crowd lives where that takes longer.
_PATIENCE_SECONDS = 60.0


class Crowd:
    """Processes that share a directory for ``seconds``, or until enough has happened, and what each tells of itself."""

    def __init__(self, folder: Path, scenario: Scenario, keep: int, seconds: float) -> None:
        self.path = folder / "run"
        self.scenario = scenario
        self.keep = keep
        self.deadline = time.monotonic() + seconds
        self.told: Counter[str] = Counter()
        self._acknowledged = folder / "acknowledged"
        self._acknowledged.touch()
        self._said = folder / "said"
        self._said.touch()
        self._over = folder / "over"
        self._members: dict[int, Callable[[], None]] = {}

    # -- what the members do -----------------------------------------------------------------------------------------

    def write(self) -> None:
        """Hold the directory for a while, over and over; another that holds it is waited for."""
        while self._goes_on():
            with contextlib.suppress(RunLocked):
                with self.scenario.checkpointer(self.path, keep=KeepLast(self.keep)) as run:
                    state = state_of(-1)
                    newest = run.resume(state)
                    assert newest >= max(self.acknowledged(), default=0), "what was acknowledged is not resumed from"
                    self._say("tenure")
                    for generation in range(newest + 1, newest + 1 + _TENURE):
                        run.save(generation, state_of(generation)).result()
                        _append(self._acknowledged, generation.to_bytes(8, "little"))
                        if not self._goes_on():
                            return
                continue
            self._say("refused")
            time.sleep(0.01)

    def read(self) -> None:
        warnings.simplefilter("error")  # falling back to an older one is a warning
        while self._goes_on():
            durable = max(self.acknowledged(), default=0)
            try:
                generation = generation_in(Run(self.path, direct=False), None)
            except CheckpointNotFound:
                assert durable == 0, f"generation {durable} was acknowledged and nothing is found"
                continue
            assert generation >= durable, f"generation {durable} was acknowledged, and {generation} is the newest"
            self._say("read")

    def verify(self) -> None:
        while self._goes_on():
            durable = bool(self.acknowledged())
            result = CliRunner().invoke(app, ["verify", str(self.path), "--all"])
            assert result.exit_code == 0 or not durable, result.output
            assert "damaged" not in result.output, result.output
            self._say("verified")

    def prune(self) -> None:
        while self._goes_on():
            result = CliRunner().invoke(app, ["prune", str(self.path), "--keep-last", str(self.keep)])
            missing = result.exit_code == _NOT_FOUND and (not self.acknowledged() or "meanwhile" in result.output)
            assert result.exit_code in (0, _LOCKED) or missing, (result.exit_code, result.output, result.exception)
            self._say(f"prune {result.exit_code}")
            time.sleep(0.005)  # a directory that is pruned all the time is held all the time

    def _goes_on(self) -> bool:
        return not self._over.exists() and time.monotonic() < self.deadline + _PATIENCE_SECONDS

    def _seen_enough(self) -> bool:
        """On a busy machine what has to happen takes longer."""
        told = Counter(self._said.read_text().splitlines()) | self.told
        return len(self.acknowledged()) > 5 and all(told[what] > least for what, least in _LEAST.items())

    def _say(self, what: str) -> None:
        _append(self._said, f"{what}\n".encode())

    def acknowledged(self) -> list[int]:
        data = self._acknowledged.read_bytes()
        return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data) - 7, 8)]

    # -- the crowd ---------------------------------------------------------------------------------------------------

    def add(self, role: Callable[[], None]) -> None:
        pid, pipe = fork(lambda _: role())
        os.close(pipe)
        self._members[pid] = role

    def kill(self, pid: int) -> None:
        """As a machine that has no memory left does."""
        os.kill(pid, signal.SIGKILL)
        del self._members[pid]
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or not self._goes_on(), "it had failed by itself"

    def live(self, rng: random.Random) -> None:
        """Two writers, of whom one dies every now and then, and all the others."""
        for role in (self.write, self.write, self.read, self.verify, self.prune):
            self.add(role)
        try:
            while time.monotonic() < self.deadline or (self._goes_on() and not self._seen_enough()):
                time.sleep(rng.uniform(0.02, 0.4))
                self.kill(rng.choice([pid for pid, role in self._members.items() if role == self.write]))
                self.told["killed"] += 1
                self.add(self.write)
            self._over.touch()
            for pid in list(self._members):
                _, status = os.waitpid(pid, 0)
                role = self._members.pop(pid)
                assert os.waitstatus_to_exitcode(status) == 0, f"{role.__name__}: see the child's traceback"
        finally:
            for pid in self._members:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.told.update(self._said.read_text().splitlines())

    def check(self) -> None:
        """What is left, when all are gone."""
        acknowledged = self.acknowledged()
        assert acknowledged == sorted(set(acknowledged)), "two writers had the directory at one time"
        visible = sorted(check_visible(self.path).values())
        kept = visible[-self.keep :]
        lost = [one for one in acknowledged if one not in visible and not (len(kept) == self.keep and one < kept[0])]
        assert not lost, f"acknowledged and gone: {lost}; {visible} are left"
        with self.scenario.checkpointer(self.path) as run:
            run.prepare(state_of(0))
        assert not leftovers(self.path)


def _append(path: Path, data: bytes) -> None:
    """In one piece, whoever else appends; what a kill interrupts is either there or not."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """zarr and the command take longer to import than a child lives."""
    path = tmp_path_factory.mktemp("warm")
    with SCENARIOS["zarr"].checkpointer(path) as run:
        run.save(1, state_of(1)).result()
    assert CliRunner().invoke(app, ["verify", str(path), "--all"]).exit_code == 0


def _crowd(tmp_path: Path, scenario: str, keep: int, seconds: float) -> dict[str, Any]:
    crowd = Crowd(tmp_path, SCENARIOS[scenario], keep, seconds)
    crowd.live(random.Random(f"{scenario}{keep}"))
    crowd.check()
    told = crowd.told
    assert len(crowd.acknowledged()) > 5, "hardly anything was saved: the test shows nothing"
    for what, least in _LEAST.items():
        assert told[what] > least, f"{what}: {told}"
    print(f"{scenario}, keep {keep}: {len(crowd.acknowledged())} acknowledged, {dict(told)}")
    return dict(told)


def test_a_reader_whose_newest_is_deleted_takes_the_newer_one_and_never_an_older(tmp_path: Path) -> None:
    """It went back to an older one that another reader had kept from retention, without a word."""
    path = tmp_path / "run"
    with SCENARIOS["links"].checkpointer(path, keep=()) as run:
        for generation in (1, 2):
            run.save(generation, state_of(generation)).result()

        class Late(Run):
            def _candidates(self) -> Listing:
                listing = super()._candidates()
                if [entry.step for entry in listing.entries] == [1, 2]:
                    run.save(3, state_of(3)).result()
                    shutil.rmtree(listing.entries[-1].path)
                return listing

        assert generation_in(Late(path), None) == 3


@pytest.mark.parametrize(("scenario", "keep"), [("links", 3), ("zarr", 1)])
def test_writers_readers_verify_and_prune_share_a_directory(scenario: str, keep: int, tmp_path: Path) -> None:
    _crowd(tmp_path, scenario, keep, 3.5)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("scenario", SCENARIOS.keys() - {"overwrite"})
def test_a_directory_is_shared_for_long(scenario: str, keep: int, tmp_path: Path) -> None:
    _crowd(tmp_path, scenario, keep, float(count("CONCURRENCY_SECONDS", 20)))
