"""Files are taken over by links where those are allowed, and written where they are not."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
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
    files_of,
    kinds,
    one_long_tensor,
    save_and_wait,
    shared_files,
    some_state,
)

from asyncckpt import AsyncCkptError, Checkpointer, Run
from asyncckpt.storage.posix import PosixOps


class NoLinks(PosixOps):
    """A file system without links of any kind."""

    def __init__(self, code: int = errno.EPERM) -> None:
        self.code = code
        self.asked = 0

    def link(self, source: str, target: str) -> None:
        self.asked += 1
        raise OSError(self.code, os.strerror(self.code))

    def reflink(self, source: str, target: str) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class CountedReads(PosixOps):
    """Counts what is read of checkpoints through aligned buffers."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def preadv(self, fd: int, buffer: Any, offset: int) -> int:
        got = super().preadv(fd, buffer, offset)
        self.read_bytes += got
        return got


#: One tensor of many extents: small ones, which are stored as they are, and ones that a codec shrinks.
EXTENTS = [4096, 32 << 10]


@pytest.mark.parametrize(
    ("changed", "extent_bytes", "shard_format", "codec"),
    thinned(((*cell, *kind) for *cell, kind in itertools.product([-1, 0, 64 * 2048], EXTENTS, KINDS)), 3),
)
def test_a_shard_in_which_one_extent_changed_is_written_whole_and_correct(
    changed: int, extent_bytes: int, shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = one_long_tensor()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=extent_bytes)) as run:
        first = save_and_wait(run, 1, state)
        run._store.ops = ops = CountedReads()
        state["w"][changed] += 1
        second = save_and_wait(run, 2, state)
        if changed:  # most of it matched before the one that did not came along
            assert ops.read_bytes > 100_000, "nothing was copied over"
        assert {component_of(name) for name in shared_files(run, first.path, second.path)} == {"n"}
        third = save_and_wait(run, 3, state)
        assert third.written_bytes < SMALL_BYTES
    assert_holds(tmp_path / "run", 2, state)
    assert_holds(tmp_path / "run", 3, state)
    state["w"][changed] -= 1
    assert Run(tmp_path / "run").verify(1) == []


@pytest.mark.parametrize(
    ("extent_bytes", "shard_format", "codec"),
    thinned(((extent, *kind) for extent, kind in itertools.product(EXTENTS, KINDS)), 3),
)
def test_where_links_are_refused_everything_is_written(
    extent_bytes: int, shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = some_state() | one_long_tensor()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=extent_bytes)) as run:
        run._store.ops = NoLinks()
        first = save_and_wait(run, 1, state)
        for step in (2, 3):
            report = save_and_wait(run, step, state)
            assert report.written_bytes == report.nbytes
            assert not _shared_inodes(first.path, report.path)
            assert_holds(tmp_path / "run", step, state)
        state["w"][-1] += 1
        save_and_wait(run, 4, state)
        assert_holds(tmp_path / "run", 4, state)


def _shared_inodes(one: str, other: str) -> set[int]:
    return {file.stat().st_ino for file in files_of(one).values()} & {
        file.stat().st_ino for file in files_of(other).values()
    }


def test_a_file_with_too_many_links_is_written_and_the_next_save_links_to_that(tmp_path: Path) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run") as run:
        save_and_wait(run, 1, state)
        run._store.ops = refusing = NoLinks(errno.EMLINK)
        second = save_and_wait(run, 2, state)
        assert refusing.asked
        assert second.written_bytes == second.nbytes
        run._store.ops = PosixOps()
        third = save_and_wait(run, 3, state)
        assert third.written_bytes < SMALL_BYTES
        assert _shared_inodes(second.path, third.path)
    assert_holds(tmp_path / "run", 3, state)


@kinds
def test_a_file_system_that_shares_blocks_gives_every_checkpoint_files_of_its_own(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    class Blocks(PosixOps):
        def reflink(self, source: str, target: str) -> None:
            shutil.copyfile(source, target)

    state = some_state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        run._store.ops = Blocks()
        first = save_and_wait(run, 1, state)
        second = save_and_wait(run, 2, state)
        assert second.written_bytes < SMALL_BYTES
    for file in data_files(first.path).values():
        file.write_bytes(b"")
    assert_holds(tmp_path / "run", 2, state)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["link", "reflink"])
def test_a_link_that_fails_for_no_good_reason_fails_the_save(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(code, os.strerror(code))

    state = {"w": torch.randn(1000), "plain": 1}
    with Checkpointer(tmp_path / "run") as run:
        save_and_wait(run, 1, state)
        ops = PosixOps()
        monkeypatch.setattr(ops, call, refuse)
        run._store.ops, run._store.reflinks = ops, call == "reflink"
        error = run.save(2, state).exception()
        assert isinstance(error, AsyncCkptError)
        assert "step 2" in str(error)
        run._store.ops = PosixOps()
        assert [entry.step for entry in run.ls()] == [1]
        save_and_wait(run, 3, state)
    assert_holds(tmp_path / "run", 3, state)
