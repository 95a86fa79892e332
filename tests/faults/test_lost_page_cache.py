"""A power cut takes everything that was not fsynced: what was acknowledged is there, verifies, and is gone on from."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scenarios import SCENARIOS, Scenario, acknowledge, acknowledged, check_visible, count, fork, state_of

from asyncckpt import Run
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing.forgetful_fs import ForgetfulFS, reason_unavailable

pytestmark = pytest.mark.skipif(reason_unavailable() is not None, reason=str(reason_unavailable()))

#: Without ``overwrite``: mfusepy knows no exchange of two names.
TRIED = [SCENARIOS[name] for name in ("safetensors", "links", "delta", "zarr", "zarr-planes", "retention")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ForgetfulFS]:
    with ForgetfulFS(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """zarr takes longer to import than a child lives."""
    with SCENARIOS["zarr-planes"].checkpointer(tmp_path_factory.mktemp("warm")) as run:
        run.save(1, state_of(1)).result()


def _lost_after_each(disk: ForgetfulFS, tmp_path: Path, scenario: Scenario, saves: int, ops: PosixOps) -> list[int]:
    """The generations that a power cut right after their acknowledgement takes, or damages."""
    lost: list[int] = []
    with scenario.checkpointer(Path(disk.path, "run")) as run:
        run._store.ops = ops
        for generation in range(1, saves + 1):
            run.save(generation, state_of(generation)).result()
            remains = tmp_path / f"remains-{generation}"
            disk.remains(remains)
            try:
                found = check_visible(remains / "run")
            except AssertionError:
                found = {}
            if found.get(generation) != generation:
                lost.append(generation)
    return lost


@pytest.mark.parametrize("scenario", TRIED, ids=str)
def test_a_power_cut_after_an_acknowledgement_takes_nothing(
    scenario: Scenario, disk: ForgetfulFS, tmp_path: Path
) -> None:
    assert _lost_after_each(disk, tmp_path, scenario, 5, PosixOps()) == []


class _NoFsync(PosixOps):
    def fsync(self, fd: int) -> None:
        pass


class _NoFsyncOfData(PosixOps):
    """Of what is written a piece at a time; the manifest and its like are synced."""

    def fsync(self, fd: int) -> None:
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            super().fsync(fd)


class _NoFsyncOfDirectories(PosixOps):
    def fsync_directory(self, path: str) -> None:
        pass


class _NoFsyncOfTheRun(PosixOps):
    """The name that publishes a checkpoint is left to luck."""

    def fsync_directory(self, path: str) -> None:
        if not path.endswith("/run"):
            super().fsync_directory(path)


class _NoFsyncOfTheAttempt(PosixOps):
    """The names inside a checkpoint are left to luck."""

    def fsync_directory(self, path: str) -> None:
        if ".tmp-" not in path:
            super().fsync_directory(path)


@pytest.mark.parametrize(
    "bug", [_NoFsync, _NoFsyncOfData, _NoFsyncOfDirectories, _NoFsyncOfTheRun, _NoFsyncOfTheAttempt]
)
def test_a_planted_bug_is_caught(bug: type[PosixOps], disk: ForgetfulFS, tmp_path: Path) -> None:
    assert 2 in _lost_after_each(disk, tmp_path, SCENARIOS["safetensors"], 2, bug())


def _train(path: Path, scenario: Scenario, pipe: int) -> None:
    with scenario.checkpointer(path) as run:
        state = state_of(-1)
        newest = run.resume(state)
        for generation in range(newest + 1, newest + 1000):
            run.save(generation, state_of(generation)).result()
            acknowledge(pipe, generation)


def _cut_at_random(disk: ForgetfulFS, scenario: Scenario, cuts: int) -> tuple[int, int]:
    """Trainers that lose power one after the other, each going on from what the last one left."""
    rng = random.Random(f"{scenario}")
    path = Path(disk.path, "run")
    durable = torn = 0
    for number in range(cuts):
        pid, pipe = fork(lambda end: _train(path, scenario, end))
        if number % 3:  # or a busy machine cuts them all before their first save; others may be cut while they begin
            select.select([pipe], [], [])
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the trainer failed by itself"
        told = acknowledged(pipe)
        torn += path.exists() and any(name.startswith(".tmp-0") for name in os.listdir(path))
        disk.cut()
        durable = max(durable, told)
        visible: dict[Any, int] = check_visible(path) if path.exists() else {}
        newest = max(visible.values(), default=0)
        assert newest >= durable, f"generation {durable} was acknowledged, {newest} is the newest left"
        durable = newest
    return durable, torn


@pytest.mark.parametrize("scenario", [SCENARIOS["safetensors"], SCENARIOS["zarr"]], ids=str)
def test_power_cuts_at_random_lose_nothing(scenario: Scenario, disk: ForgetfulFS) -> None:
    durable, torn = _cut_at_random(disk, scenario, 6)
    assert durable > 2, "hardly anything was saved: the test shows nothing"
    assert torn > 0, "no cut hit a save in flight"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", TRIED, ids=str)
def test_many_power_cuts_at_random_lose_nothing(scenario: Scenario, disk: ForgetfulFS) -> None:
    cuts = count("POWER_CUTS", 200)
    durable, torn = _cut_at_random(disk, scenario, cuts)
    assert durable > cuts // 4
    assert torn > cuts // 20
    print(f"{scenario}: {cuts} power cuts at random, {torn} of them in a save; generation {durable}, none lost")


def test_what_was_never_synced_is_forgotten(disk: ForgetfulFS) -> None:
    """The double itself: bytes and names, each on its own."""
    ops, root = PosixOps(), Path(disk.path)
    for name in ("both", "bytes", "name", "neither"):
        (root / name).write_bytes(b"old")
        if name in ("both", "bytes"):
            fd = os.open(root / name, os.O_WRONLY)
            ops.fsync(fd)
            os.close(fd)
    os.rename(root / "bytes", root / "renamed")
    ops.fsync_directory(disk.path)
    os.rename(root / "both", root / "later")
    (root / "neither").unlink()
    disk.cut()
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {
        "both": b"old",
        "renamed": b"old",
        "name": b"",
        "neither": b"",
    }
    assert Run(disk.path).ls() == []
