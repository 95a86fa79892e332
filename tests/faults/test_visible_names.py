"""A name counts as a checkpoint once it is durable, and what fails on the way there leaves nothing behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, DurabilityUnknown, KeepLast, RunOptions, SaveFailed
from asyncckpt.testing import Fault, FaultyOps, InterceptedOps, Site, SiteFaultOps

STATE = {"w": torch.arange(50_000, dtype=torch.float32), "plain": {"a": 1}}


def _sites(run: Checkpointer) -> SiteFaultOps:
    ops = SiteFaultOps(run.path)
    run._store.ops = ops
    return ops


RUN_FSYNC = Site("fsync_directory", ".", 1)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_that_could_not_be_made_durable_is_taken_back(overwrite: bool, tmp_path: Path) -> None:
    """It stayed visible, and retention counted it: the acknowledged one before could be deleted for it."""
    run = Checkpointer(tmp_path / "run", keep=KeepLast(1), run=RunOptions(overwrite=overwrite))
    run.save(1, STATE).result()
    ops = _sites(run)
    ops.arm(Fault(RUN_FSYNC, "before", errno.EIO))
    step = 1 if overwrite else 2
    with pytest.raises(SaveFailed, match="Nothing was published"):
        run.save(step, {**STATE, "w": STATE["w"] + 1}).result()
    ops.arm()
    run.prune()
    assert [entry.step for entry in run.ls()] == [1]
    assert torch.equal(run.load_tensors(1)["w.value"], STATE["w"]), "the acknowledged one was replaced"
    run.save(step, STATE).result()
    assert run.verify(step) == []
    run.close()


def test_a_name_that_can_be_neither_made_durable_nor_taken_back_counts_for_nothing(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run", keep=KeepLast(1))
    run.save(1, STATE).result()
    run.wait()
    ops = _sites(run)
    back = Site("rename_noreplace", ".tmp-*", 1)
    ops.arm(Fault(RUN_FSYNC, "before", errno.EIO), Fault(back, "before", errno.EIO))
    with pytest.raises(DurabilityUnknown, match="may be gone after a power cut"):
        run.save(2, STATE).result()
    assert len(ops.hits) == 2
    ops.arm()
    assert run.prune() == [], "retention deleted an acknowledged checkpoint for one that is not"
    assert [entry.step for entry in run.ls()] == [1, 2]
    run.save(2, STATE).result()  # the step is free, and what was there is kept aside
    assert list((tmp_path / "run").glob(".damaged-step~00000002-*"))
    run.close()


def test_what_is_visible_is_made_durable_before_anything_is_deleted_for_it(tmp_path: Path) -> None:
    """A trainer killed between its rename and the fsync left a name that only memory knew."""
    run = Checkpointer(tmp_path / "run")
    run.save(1, STATE).result()
    run.close()
    (tmp_path / "run" / f".tmp-00000002-{'01' * 16}").mkdir()
    after = Checkpointer(tmp_path / "run")
    ops = FaultyOps()
    after._store.ops = ops
    after.prepare(STATE)
    assert ("fsync_directory", "run") in ops.log
    assert ops.log.index(("fsync_directory", "run")) < next(
        n for n, (call, name) in enumerate(ops.log) if call == "rename_noreplace"
    )
    after.close()


def test_a_writer_that_is_cut_off_while_it_publishes_gets_everything_or_nothing(tmp_path: Path) -> None:
    """Its attempt was deleted file by file: it could publish, and acknowledge, what was half deleted."""

    class CutOff(InterceptedOps):
        """Between its last look at the lease and the rename, another run takes the directory over."""

        def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if name == "rename_noreplace":
                other = Checkpointer(tmp_path / "run", run=RunOptions(takeover=True))
                other._store.ops = Deleting()
                other.prepare(STATE)
                other.close()
            return args

    class Deleting(InterceptedOps):
        """The other run has begun to delete what it found, when the writer goes on."""

        def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if name == "rmdir" and "-0000" in args[0]:
                raise OSError(errno.EIO, "the rest is not deleted yet")
            return args

    run = Checkpointer(tmp_path / "run")
    run.prepare(STATE)
    run._store.ops = CutOff()
    with pytest.raises(SaveFailed):
        run.save(1, STATE).result()
    assert run.ls() == []
    run.close()


def test_a_hint_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    run.prepare(STATE)
    ops = _sites(run)
    ops.arm(Fault(Site("pwrite", ".tmp-latest-*", 1), "before", errno.ENOSPC))
    run.save(1, STATE).result()
    tidied = threading.Event()
    run._committer._pool.submit(tidied.set)  # the hint is written after the acknowledgement
    assert tidied.wait(10)
    assert ops.hits
    assert not [name for name in os.listdir(run.path) if name.startswith(".tmp-latest")]
    run.close()
