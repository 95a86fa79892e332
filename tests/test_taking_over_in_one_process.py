"""A cell that is run again goes on with its own directory; a run that is in use, or gone, is not taken over."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from asyncckpt import Checkpointer, CheckpointerClosed, PendingSave, RunLocked, RunPathError
from asyncckpt.testing import GatedOps

STATE = {"w": torch.arange(1000.0)}


def test_a_cell_that_is_run_again_takes_over_and_loses_nothing(tmp_path: Path) -> None:
    earlier = Checkpointer(tmp_path / "run")
    earlier.prepare(STATE)
    ops = earlier._store.ops = GatedOps()
    in_flight = earlier.save(1, STATE)
    threading.Timer(0.1, ops.gate.set).start()
    with Checkpointer(tmp_path / "run") as run:
        assert run.resume({"w": torch.zeros(1000)}) == 1
        assert in_flight.result(0).step == 1
        run.save(2, STATE).result(20)
        with pytest.raises(CheckpointerClosed, match="newer Checkpointer of this process"):
            earlier.save(3, STATE)
    earlier.close()


def test_one_that_was_only_dropped_is_no_obstacle(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        dropped = Checkpointer(tmp_path / "run")
        dropped.myself = dropped  # type: ignore[attr-defined]  # a cycle: the collector has not come yet
        dropped.save(step, STATE)
        del dropped
    with Checkpointer(tmp_path / "run") as run:
        assert run.resume({"w": torch.zeros(1000)}) == 3


def test_one_inside_its_with_block_is_in_use(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, STATE).result(20)
        with pytest.raises(RunLocked):
            Checkpointer(tmp_path / "run").save(2, STATE)
        run.save(2, STATE).result(20)


def test_one_of_another_thread_is_in_use(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    run.save(1, STATE).result(20)
    found: list[BaseException] = []

    def other() -> None:
        try:
            Checkpointer(tmp_path / "run").save(2, STATE)
        except RunLocked as error:
            found.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    assert found
    run.close()


@pytest.mark.parametrize("under_a_save", [False, True])
def test_a_directory_that_is_deleted_is_said_to_be_gone(under_a_save: bool, tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    run.save(1, STATE).result(20)
    ops = run._store.ops = GatedOps()
    pending: PendingSave | None = run.save(2, STATE) if under_a_save else None
    while (tmp_path / "run").exists():  # the save may be making its own directory there
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    ops.gate.set()
    pending = pending or run.save(2, STATE)
    with pytest.raises(RunPathError, match=r"run is gone: somebody deleted.*nobody has taken it over"):
        pending.result(20)
    assert not (tmp_path / "run").exists()
    run.close()
    with Checkpointer(tmp_path / "run") as anew:
        anew.save(1, STATE).result(20)
