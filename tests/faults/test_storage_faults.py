"""Every system call of a save can fail; none of them may cost an acknowledged checkpoint or publish a torn one."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_all_memory_came_back
from support.deferring import let_all_be_deferred
from support.examples import thinned
from support.options import by_stage

from asyncckpt import Checkpointer, KeepLast, NotEnoughSpace, Safetensors, SaveFailed, StepExists
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import FaultyOps

STATE = {"w": torch.arange(50_000, dtype=torch.float32), "plain": {"a": 1}}
CALLS = ["open", "close", "pwrite", "truncate", "fsync", "fsync_directory", "write_file", "mkdir", "rename_noreplace"]


def _with_ops(path: Path, **options: Any) -> tuple[Checkpointer, FaultyOps]:
    run = Checkpointer(path, **by_stage(extent_bytes=64 << 10, **{"incremental": False, **options}))
    run.prepare(STATE)
    run.save(1, STATE).result()
    run.wait()
    ops = FaultyOps()
    run._store.ops = ops
    return run, ops


FAULTS = [
    (call, number, code)
    for call in CALLS
    for number in (1, 2, 3)
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE)
]


@pytest.mark.parametrize(
    "fault", thinned(((fault,) for fault in FAULTS), 3), ids=lambda f: f"{f[0]}-{f[1]}-{errno.errorcode[f[2]]}"
)
def test_a_failing_call_loses_nothing_and_publishes_nothing_torn(fault: Any, tmp_path: Path) -> None:
    run, ops = _with_ops(tmp_path / "run")
    ops.fail = fault
    pending = run.save(2, STATE)
    error = pending.exception(30)
    hit = ops.seen >= fault[1]
    if error is not None:
        assert isinstance(error, SaveFailed | NotEnoughSpace), f"untyped: {error!r}"
        assert "step 2" in str(error)
        assert isinstance(error, NotEnoughSpace) == (fault[2] in (errno.ENOSPC, errno.EDQUOT))
    else:
        # the second open and close are those of the ``latest`` hint, written after the acknowledgement
        hint = fault[0] in ("open", "close") and fault[1] > 1
        assert not hit or hint, "an error of a data or directory call was swallowed"
    ops.fail = None
    _all_good(run, error)


def _all_good(run: Checkpointer, error: BaseException | None) -> None:
    for entry in run.ls():
        assert entry.damage is None
        assert run.verify(entry.step) == []
    acknowledged = {1} | ({2} if error is None else set())
    assert acknowledged <= {entry.step for entry in run.ls()}
    if error is not None:
        patience = time.monotonic() + 10  # the error is told first, and a write may still be in the kernel then
        while [name for name in os.listdir(run.path) if name.startswith(".tmp-")] and time.monotonic() < patience:
            time.sleep(0.01)
        assert not [name for name in os.listdir(run.path) if name.startswith(".tmp-")]
    run.save(3, STATE).result()  # the run goes on
    assert run.verify(3) == []
    run.close()


@pytest.mark.parametrize(
    ("codec", "call", "number", "code"),
    thinned(
        itertools.product(
            ["none", "planes"], [*CALLS, "link", "reflink"], [1, 2], [errno.EIO, errno.ENOSPC, errno.EPERM]
        ),
        5,
    ),
)
def test_a_failing_call_of_a_zarr_save_that_links(
    codec: str, call: str, number: int, code: int, tmp_path: Path
) -> None:
    run, ops = _with_ops(tmp_path / "run", format="zarr", codec=codec, incremental=True)
    ops.fail = (call, number, code)
    error = run.save(2, {**STATE, "w": STATE["w"] + 1}).exception(30)
    if error is not None:
        assert isinstance(error, SaveFailed | NotEnoughSpace), f"untyped: {error!r}"
        assert "step 2" in str(error)
    elif ops.seen >= number:
        hint = call in ("open", "close") and number > 1  # of ``latest``, after the acknowledgement
        no_link = call in ("link", "reflink") and code == errno.EPERM  # where there are none, everything is written
        assert hint or no_link, "an error of a data or directory call was swallowed"
    ops.fail = None
    _all_good(run, error)


def test_the_write_ordering_is_the_documented_one(tmp_path: Path) -> None:
    run, ops = _with_ops(tmp_path / "run", keep=KeepLast(1))
    run.save(2, STATE).result()
    run.close()
    log = [entry for entry in ops.log if entry[0] not in ("open", "close", "pwrite", "truncate")]
    names = [f"{call} {name}" if not name.startswith(".t") else f"{call} {name[:5]}" for call, name in log]
    assert names[0] == "mkdir .tmp-"
    shard = names.index("fsync w-00001-of-00001.safetensors")
    state = names.index("write_file state.json")
    first_sync = names.index("fsync_directory .tmp-")
    manifest = names.index("write_file manifest.json")
    assert shard < first_sync < manifest
    assert state < first_sync
    rest = names[manifest:]
    assert rest[:5] == [
        "write_file manifest.json",
        "fsync manifest.json",
        "fsync_directory .tmp-",
        "rename_noreplace step-00000002",
        "fsync_directory run",
    ], "manifest last and fsynced, its directory, the rename, the parent"
    assert rest[5] == "rename_noreplace .tras", "retention acts only after the new checkpoint is durable"


def test_short_writes_are_continued(tmp_path: Path) -> None:
    run, ops = _with_ops(tmp_path / "run")
    ops.short_writes = True
    run.save(2, STATE).result()
    assert sum(call == "pwrite" for call, _ in ops.log) > 40
    assert run.verify(2) == []
    run.close()


def test_fsync_is_never_tried_twice(tmp_path: Path) -> None:
    run, ops = _with_ops(tmp_path / "run")
    ops.fail = ("fsync", 1, errno.EIO)
    with pytest.raises(SaveFailed):
        run.save(2, STATE).result()
    synced = [name for call, name in ops.log if call == "fsync"]
    assert len(synced) == len(set(synced))
    run.close()


def test_a_checkpoint_that_somebody_else_put_there_is_not_replaced(tmp_path: Path) -> None:
    run, _ = _with_ops(tmp_path / "run")
    (tmp_path / "run" / "step-00000002").mkdir()
    (tmp_path / "run" / "step-00000002" / "notes").write_text("mine")
    with pytest.raises(StepExists, match="left as it is"):
        run.save(2, STATE).result()
    assert os.listdir(tmp_path / "run" / "step-00000002") == ["notes"]
    run.close()


def test_a_file_system_without_noreplace_rename_still_never_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncckpt.storage.posix._renameat2", lambda *_: errno.EINVAL)
    run, _ = _with_ops(tmp_path / "run")
    run.save(2, STATE).result()
    (tmp_path / "run" / "step-00000003").mkdir()
    (tmp_path / "run" / "step-00000003" / "notes").write_text("mine")
    with pytest.raises(StepExists):
        run.save(3, STATE).result()
    run.close()


def test_a_file_system_that_refuses_direct_io_is_written_through_the_cache(tmp_path: Path) -> None:
    class NoDirect(PosixOps):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no direct transfers here")
            return super().pwrite(fd, data, offset)

    run = Checkpointer(tmp_path / "run")
    run._store.ops = NoDirect()
    run.save(1, STATE).result()
    assert run.verify(1) == []
    run.close()


def test_read_back_catches_a_device_that_lies(tmp_path: Path) -> None:
    from asyncckpt import WriterOptions

    class Liar(PosixOps):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            bad = bytearray(data)
            bad[100] ^= 4
            view = memoryview(__import__("mmap").mmap(-1, len(bad)))
            view[:] = bad
            return super().pwrite(fd, view, offset)

    run = Checkpointer(tmp_path / "run", writer=WriterOptions(read_back=True, reuse_unchanged=False))
    run.save(1, STATE).result()
    run._store.ops = Liar()
    with pytest.raises(SaveFailed, match="read back differs"):
        run.save(2, STATE).result()
    assert [entry.step for entry in run.ls()] == [1]
    run.close()


def test_an_extent_that_is_being_staged_while_its_save_fails_gives_its_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors were let go of between the memory and the copy: the slot was lost to all saves after."""
    state = {"w": torch.randn(100_000)}
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=64 << 10)) as run:
        run.save(1, state).result()
        run.wait()
        arena = run._arena
        acquire = arena.acquire

        def fail_meanwhile(*args: Any) -> StagingBuffer:
            slot = acquire(*args)
            for flight in run._in_flight.all():
                flight.save.scope.fail(OSError(errno.EIO, "late"))
                assert isinstance(flight.pending.exception(30), SaveFailed)
            return slot

        monkeypatch.setattr(arena, "acquire", fail_meanwhile)
        assert run.save(2, state).failed()
        monkeypatch.undo()
        run.save(3, state).result()
        assert_all_memory_came_back(arena)


def test_a_disk_error_while_the_training_thread_copies_is_not_thrown_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a watched optimizer ``save`` raised the bare error of the background, without step or path."""
    owned, other = torch.randn(1000, requires_grad=True), torch.randn(1_000_000)  # too large to be cloned instead
    ops = FaultyOps()
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=512 << 10)) as run:
        optimizer = torch.optim.SGD([owned], lr=0.1)
        let_all_be_deferred(run).watch(optimizer)
        run.save(1, {"owned": owned, "other": other}).result()
        run._store.ops = ops
        acquire = run._arena.acquire

        slots: list[StagingBuffer] = []

        def all_but_the_first_once_the_disk_has_failed(
            nbytes: int, deadline: float | None, cancelled: Callable[[], bool], if_short: Callable[[], None]
        ) -> StagingBuffer:
            patience = time.monotonic() + 10
            while slots and not cancelled() and time.monotonic() < patience:
                time.sleep(0.001)
            slots.append(acquire(nbytes, deadline, if_short=if_short))
            return slots[-1]

        monkeypatch.setattr(run._arena, "acquire", all_but_the_first_once_the_disk_has_failed)
        ops.fail = ("mkdir", 1, errno.EIO)
        other += 1
        pending = run.save(2, {"owned": owned, "other": other})
        with pytest.raises(SaveFailed, match=r"step 2: writing .*Input/output error.*Check the storage"):
            pending.result(30)
        assert 1 <= len(slots) <= 3, "somebody copied on, or nothing"  # the first, and one at hand of each thread
        monkeypatch.undo()
        run.save(3, {"owned": owned, "other": other}).result(30)
