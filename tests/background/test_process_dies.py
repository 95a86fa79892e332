"""A background process that is killed, or hangs, costs the saves that it was writing, typed, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_all_memory_came_back
from support.background import background_pids, only_pid, stop, until

from asyncckpt import Checkpointer, Run, Safetensors, SaveFailed, StagingOptions, WriterOptions

ALWAYS = WriterOptions(process="always")
SMALL = {"writer": ALWAYS, "files": Safetensors(extent_bytes=256 << 10, shard_bytes=1 << 20)}


def _state(step: int) -> dict[str, Any]:
    return {"w": torch.full((700_000,), float(step)), "still": torch.arange(60_000), "meta": {"step": step}}


def _open_descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return {one for one in found if "memfd" in one or "pidfd" in one or "lease" in one}


def _kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _random_kills(path: Path, seed: int, saves: int) -> None:
    rng = random.Random(seed)
    acknowledged: set[int] = set()
    before = _open_descriptors()
    options = StagingOptions(max_in_flight=3, budget_bytes=rng.choice([2 << 20, 16 << 20]))
    with Checkpointer(path, staging=options, **SMALL) as run:
        run.save(0, _state(0)).result()
        for step in range(1, saves + 1):
            state = _state(step)
            pids = background_pids()
            killed = threading.Timer(rng.uniform(0, 0.06), _kill, pids)
            if rng.random() < 0.7:
                killed.start()
            pending = run.save(step, state)
            if rng.random() < 0.3:
                pending.exception(30)
            if killed.is_alive():
                killed.join()
            error = pending.exception(30)
            if error is None:
                acknowledged.add(step)
            else:
                assert isinstance(error, SaveFailed), error
                assert f"step {step}" in str(error)
        if run.save(saves + 1, _state(saves + 1)).exception(30) is None:  # that the process is gone may be news to it
            acknowledged.add(saves + 1)
        run.save(saves + 2, _state(saves + 2)).result(30)
        arena = run._builder.arena
        assert_all_memory_came_back(arena)
    acknowledged |= {0, saves + 2}
    found = {entry.step for entry in Run(path).ls()}
    assert acknowledged <= found
    for step in found:
        assert Run(path).verify(step) == []
        values = Run(path).load(step)["w"]
        assert bool((values == step).all())
    assert not [one for one in os.listdir(path) if one.startswith((".tmp", ".trash"))]
    until(lambda: not background_pids())
    del arena
    assert _open_descriptors() <= before


def test_a_process_killed_at_any_moment_costs_the_save_in_flight_alone(tmp_path: Path) -> None:
    _random_kills(tmp_path / "run", 3, 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_process_killed_at_many_moments(tmp_path: Path, seed: int) -> None:
    _random_kills(tmp_path / "run", seed, 40)


def test_a_process_killed_before_anything_was_written_names_the_signal(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", **SMALL) as run:
        run.save(1, _state(1)).result()
        process = only_pid()
        stop(process)
        pending = run.save(2, _state(2))
        os.kill(process, signal.SIGKILL)
        error = pending.exception(30)
        assert isinstance(error, SaveFailed)
        assert "SIGKILL" in str(error)
        run.save(3, _state(3)).result(30)
        assert only_pid() != process
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [1, 3]


def test_a_process_that_hangs_is_given_up_at_the_deadline_and_replaced(tmp_path: Path) -> None:
    writer = WriterOptions(process="always", durable_timeout_seconds=5.0)  # a process takes a second to come
    with Checkpointer(tmp_path / "run", writer=writer) as run:
        run.save(1, _state(1)).result()
        process = only_pid()
        stop(process)
        pending = run.save(2, _state(2))
        error = pending.exception(30)
        assert isinstance(error, SaveFailed), error
        run.save(3, _state(3)).result(30)
        until(lambda: process not in background_pids())
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [1, 3]
