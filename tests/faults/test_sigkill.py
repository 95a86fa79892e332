"""A trainer killed at any moment of a save loses nothing that was acknowledged and leaves nothing torn."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.options import by_stage

from asyncckpt import Checkpointer, Delta, KeepLast, Run, Zarr


def _state(step: int) -> dict[str, Any]:
    """A state that says which step it is in every byte."""
    return {
        "w": torch.full((300_000,), float(step)),
        "b": torch.full((17,), step),
        "still": torch.arange(60_000),  # linked from save to save
        "meta": {"step": step},
    }


#: A run may go on in another format: what is saved differently is not taken over.
KINDS: list[dict[str, Any]] = [
    {},
    {"format": "zarr"},
    {"format": "zarr", "codec": "planes"},
    {"codec": "planes", "delta": Delta(chain=3)},
]


def _trainer(path: Path, acknowledged: int, first: int, deferred: bool, kind: dict[str, Any]) -> None:
    """Save step after step, and write each acknowledged step to a pipe the parent reads."""
    with Checkpointer(path, **by_stage(keep=KeepLast(2), staging_bytes=4 << 20, shard_bytes=1 << 20, **kind)) as run:
        for step in range(first, first + 1000):
            pending = run.save(step, _state(step))
            pending.add_done_callback(lambda done: os.write(acknowledged, done.step.to_bytes(8, "little")))
            if not deferred:
                pending.result()


def _kill_once(path: Path, first: int, rng: random.Random, longest: float = 0.12) -> int:
    """Fork a trainer, kill it at a random moment; the newest acknowledged step (or ``first - 1``)."""
    read_end, write_end = os.pipe()
    deferred = rng.random() < 0.5
    kind = KINDS[0] if rng.random() < 0.4 else rng.choice(KINDS[1:])
    pid = os.fork()
    if pid == 0:  # the child must never return into pytest
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads do not exist in a fork
            os.close(read_end)
            _trainer(path, write_end, first, deferred, kind)
        finally:
            os._exit(3)
    os.close(write_end)
    time.sleep(rng.uniform(0.0, longest))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the trainer failed by itself"
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    return max((int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)), default=first - 1)


def _check(path: Path, newest_acknowledged: int) -> int:
    """What is visible is whole, and holds the step it says; returns the step that is resumed from."""
    run = Run(path, direct=False)
    for entry in run.ls():
        assert entry.damage is None, f"torn and visible: {entry}"
        assert run.verify(entry.step) == []
    if not run.ls():
        assert newest_acknowledged < 1, "an acknowledged checkpoint is gone"
        return 0
    state = _state(-1)
    report = run.restore(state)
    assert report.step >= newest_acknowledged, f"step {newest_acknowledged} was acknowledged, {report.step} is left"
    assert state["meta"] == {"step": report.step}
    assert bool((state["w"] == report.step).all())
    assert bool((state["b"] == report.step).all())
    return report.step


def _kills(path: Path, count: int) -> tuple[int, int]:
    rng = random.Random(2026)
    step, in_flight, longest = 0, 0, 0.12
    with Checkpointer(path.with_name("warm"), files=Zarr()) as run:
        run.save(1, _state(1)).result()  # zarr takes longer to import than a child lives
    for _ in range(count):
        acknowledged = _kill_once(path, step + 1, rng, longest)
        # a busy machine needs longer lives to save anything in them
        longest = min(2.0, longest * 1.2) if acknowledged <= step else max(0.12, longest * 0.8)
        in_flight += any(name.startswith(".tmp-0") for name in os.listdir(path)) if path.exists() else 0
        step = _check(path, max(acknowledged, step))
    return step, in_flight


@pytest.mark.skipif(sys.platform != "linux", reason="fork and SIGKILL as on Linux")
def test_nothing_acknowledged_is_lost_at_60_random_kills(tmp_path: Path) -> None:
    step, in_flight = _kills(tmp_path / "run", 60)
    assert step > 20, "the trainer hardly saved anything: the test shows nothing"
    assert in_flight > 20, "hardly a kill hit a save in flight"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_acknowledged_is_lost_at_2000_random_kills(tmp_path: Path) -> None:
    step, in_flight = _kills(tmp_path / "run", 2000)
    assert step > 500
    assert in_flight > 400


def test_the_next_run_reclaims_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "run"
    rng = random.Random(5)
    while not any(name.startswith(".tmp-0") for name in (os.listdir(path) if path.exists() else [])):
        _kill_once(path, max((entry.step for entry in Run(path).ls()), default=0) + 1, rng)
    with Checkpointer(path) as run:
        run.prepare(_state(1))
        assert not [name for name in os.listdir(path) if name.startswith(".tmp-")]
