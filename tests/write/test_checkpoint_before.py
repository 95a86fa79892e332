"""The checkpoint before may be damaged, gone or deleted meanwhile: a new one holds what was saved."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.examples import thinned
from support.options import by_stage
from support.taking_over import (
    KINDS,
    SMALL_BYTES,
    assert_holds,
    component_of,
    data_files,
    kinds,
    one_long_tensor,
    save_and_wait,
    shared_files,
    some_state,
)

from asyncckpt import AsyncCkptError, Checkpointer, Safetensors
from asyncckpt.storage.posix import PosixOps
from asyncckpt.write.link_checks import LinkRound


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 8
    file.write_bytes(data)


def _hole(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(b"")
    os.truncate(file, size)


def _symlink(file: Path) -> None:
    elsewhere = next(folder for folder in file.parents if folder.name.startswith("step-")).parent.parent / "elsewhere"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "hole": _hole,
    "deleted": lambda file: file.unlink(),
    "symlink": _symlink,
    "fifo": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize(
    ("damage", "linking", "shard_format", "codec"),
    thinned(((*cell, *kind) for *cell, kind in itertools.product(DAMAGES, [True, False], KINDS)), 3),
)
def test_damage_to_the_checkpoint_before_is_never_copied_into_a_new_one(
    damage: str, linking: bool, shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = one_long_tensor()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=32 << 10)) as run:
        first = save_and_wait(run, 1, state)
        [file] = [file for name, file in data_files(first.path).items() if component_of(name) == "w"]
        DAMAGES[damage](file)
        if not linking:
            state["w"][-1] += 1
        error = run.save(2, state).exception()
        if error is not None:
            assert isinstance(error, AsyncCkptError), f"untyped: {error!r}"
            assert 2 not in {entry.step for entry in run.ls()}
        elif linking and run.verify(2):
            # one file of two names: what is wrong with it was wrong before, is seen, and is nowhere else
            assert shared_files(run, first.path, str(tmp_path / "run" / "step-00000002"))
            assert {entry.file for entry in run.verify(2)} == {str(file.relative_to(first.path))}
            return
        else:
            assert_holds(tmp_path / "run", 2, state)
        save_and_wait(run, 3, state)
        assert_holds(tmp_path / "run", 3, state)
        assert run.verify(1), "the damage must not be covered up"


@pytest.mark.parametrize("linking", [True, False], ids=["linking", "copying"])
@pytest.mark.parametrize("damage", [DAMAGES["cut"], DAMAGES["deleted"]], ids=["cut", "deleted"])
def test_a_save_that_fails_for_damage_to_the_one_before_names_both_and_says_what_to_do(
    damage: Callable[[Path], object], linking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = one_long_tensor()
    monkeypatch.setattr(LinkRound, "take", lambda *_: False)  # it is the turn of others to be read back
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=32 << 10)) as run:
        first = save_and_wait(run, 1, state)
        damage(Path(first.path) / "w-00001-of-00001.safetensors")
        if not linking:
            state["w"][-1] += 1
        message = str(run.save(2, state).exception())
        assert "step 2" in message
        assert "step-00000001" in message
        assert "Save again" in message


def test_a_save_right_after_a_durable_one_is_compared_with_that_one(tmp_path: Path) -> None:
    """Whoever was told that a save is durable may save again at once, however long the committer takes to tidy up."""

    class Noticing(PosixOps):
        def __init__(self) -> None:
            self.decided = threading.Event()

        def link(self, source: str, target: str) -> None:
            super().link(source, target)
            self.decided.set()

        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            self.decided.set()
            return super().pwrite(fd, data, offset)

    state = {"w": torch.randn(100_000)}
    with Checkpointer(tmp_path / "run") as run:
        save_and_wait(run, 1, state)
        state["w"] += 1
        ops = Noticing()
        pending = run.save(2, state)
        pending.add_done_callback(lambda _: ops.decided.wait(30))  # holds the committer's thread
        second = pending.result()
        run._store.ops = ops
        third = run.save(3, state).result()
        assert shared_files(run, second.path, third.path)
        assert third.written_bytes < SMALL_BYTES


@kinds
def test_where_the_checkpoint_before_is_gone_everything_is_written(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = save_and_wait(run, 1, state)
        shutil.rmtree(first.path)
        second = save_and_wait(run, 2, state)
        assert second.written_bytes == second.nbytes
        assert_holds(tmp_path / "run", 2, state)
        third = save_and_wait(run, 3, state)
        assert third.written_bytes < SMALL_BYTES


def test_nothing_is_taken_over_from_a_checkpoint_that_was_found_damaged(tmp_path: Path) -> None:
    state = {"w": torch.randn(100_000)}
    with Checkpointer(tmp_path / "run") as run:
        save_and_wait(run, 1, state)
        state["w"] += 1
        second = save_and_wait(run, 2, state)
        _flip(Path(second.path) / "w-00001-of-00001.safetensors")
        with pytest.warns(RuntimeWarning, match="step-00000002 cannot be used"):
            assert run.resume({"w": torch.zeros(100_000)}) == 1
        save_and_wait(run, 2, state)  # what training came to again
        assert_holds(tmp_path / "run", 2, state)


@kinds
def test_a_step_that_is_saved_again_may_take_over_what_it_replaces(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, overwrite=True)) as run:
        save_and_wait(run, 1, state)
        for value in (1, 0, 1):
            state["tiny"][0] += value
            assert save_and_wait(run, 1, state).written_bytes < SMALL_BYTES
            assert_holds(tmp_path / "run", 1, state)


def test_after_a_failed_save_the_one_before_it_is_compared_with(tmp_path: Path) -> None:
    class Failing(PosixOps):
        def fsync_directory(self, path: str) -> None:
            raise OSError(errno.EIO, "failed on purpose")

    state = some_state()
    with Checkpointer(tmp_path / "run") as run:
        first = save_and_wait(run, 1, state)
        run._store.ops = Failing()
        state["big"] += 1
        assert run.save(2, state).exception() is not None
        run._store.ops = PosixOps()
        third = save_and_wait(run, 3, state)
        assert {component_of(name) for name in shared_files(run, first.path, third.path)} == {"same", "tiny"}
    assert_holds(tmp_path / "run", 3, state)


class Gate(PosixOps):
    """Writes wait for ``open``; ``reached`` is set once one does."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open_gate = threading.Event()

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        self.reached.set()
        self.open_gate.wait(30)
        return super().pwrite(fd, data, offset)


def test_retention_leaves_a_checkpoint_alone_that_a_save_takes_files_from(tmp_path: Path) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run") as run:
        first = save_and_wait(run, 1, state)
        gate = run._store.ops = Gate()
        state["big"] += 1
        pending = run.save(2, state)
        try:
            assert gate.reached.wait(30)
            assert run._store.remove(os.path.basename(first.path)) is False
        finally:
            gate.open_gate.set()
        pending.result()
        run.wait()
        assert run._store.remove(os.path.basename(first.path)) is True
        assert_holds(tmp_path / "run", 2, state)
