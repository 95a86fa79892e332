"""Every system call of a save can fail; none of them may cost an acknowledged checkpoint or publish a torn one."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_all_memory_came_back
from support.examples import thinned
from support.options import by_stage

from asyncckpt import (
    Checkpointer,
    DurabilityUnknown,
    KeepLast,
    NotEnoughSpace,
    RunLocked,
    RunOptions,
    RunPathError,
    Safetensors,
    SaveFailed,
    StepExists,
)
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import Fault, FaultyOps, InterceptedOps, Site, SiteFaultOps

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
    (tmp_path / "run" / "step-00000002").mkdir()  # plain rename would silently replace an empty directory
    with pytest.raises(StepExists, match="left as it is"):
        run.save(2, STATE).result()
    assert os.listdir(tmp_path / "run" / "step-00000002") == []
    run.close()


def test_a_file_system_without_noreplace_rename_still_never_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncckpt.storage.posix._renameat2", lambda *_: errno.EINVAL)
    run, _ = _with_ops(tmp_path / "run")
    run.save(2, STATE).result()
    (tmp_path / "run" / "step-00000003").mkdir()
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "t", mount], check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_foreseen_and_older_checkpoints_stay(small_disk: Path) -> None:
    state = {"w": torch.zeros(130_000)}  # 0.5 MB; small files are estimated at 4 MiB, more than this disk has
    run = Checkpointer(small_disk / "run")
    with pytest.raises(NotEnoughSpace, match=r"step 1: .* bytes free and the save needs .*free space"):
        run.save(1, state).result()
    assert not [name for name in os.listdir(small_disk / "run") if name.startswith(("step", ".tmp"))]
    run.close()


def test_a_disk_that_fills_up_during_the_save_removes_the_attempt(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpointer(small_disk / "run")
    monkeypatch.setattr(run._store, "free_bytes", lambda: 1 << 40)  # the estimate was wrong
    run.save(1, {"w": torch.zeros(130_000)}).result()
    with pytest.raises(NotEnoughSpace, match="step 2"):
        run.save(2, {"w": torch.zeros(900_000)}).result()
    assert [name for name in sorted(os.listdir(small_disk / "run")) if name.startswith(("step", ".tmp"))] == [
        "step-00000001"
    ]
    assert run.verify(1) == []
    run.save(3, {"w": torch.zeros(130_000)}).result()
    run.close()


def test_too_little_space_runs_retention_before_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Checkpointer(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(step, STATE).result()
    run.wait()
    run._committer.policies = (KeepLast(1),)
    space = lambda: 1 << 30 if len(run.ls()) < 3 else 0  # noqa: E731
    monkeypatch.setattr(run._store, "free_bytes", space)
    run.save(4, STATE).result()
    run.wait()
    assert [entry.step for entry in run.ls()] == [4]
    run.close()


def test_paths_that_cannot_be_used_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunPathError, match=r"is a file.*another path"):
        Checkpointer(tmp_path / "file").save(1, STATE)
    with pytest.raises(RunPathError, match=r"does not exist.*create_parents=True"):
        Checkpointer(tmp_path / "no" / "such" / "run").save(1, STATE)
    with pytest.raises(RunPathError, match=r"part of the path is a file|does not exist"):
        Checkpointer(tmp_path / "file" / "run").save(1, STATE)
    with Checkpointer(tmp_path / "no" / "such" / "run", run=RunOptions(create_parents=True)) as run:
        run.save(1, STATE).result()


def test_a_probe_that_another_run_tidies_up_is_no_unusable_path(tmp_path: Path) -> None:
    """Of two runs that began at one time, the second was told to repair its path: it has to hear of the first."""

    class Tidied(InterceptedOps):
        def after(self, name: str, args: tuple[Any, ...]) -> None:
            if name == "mkdir" and "probe" in args[0]:
                LocalStore(str(tmp_path / "run")).reclaim()

    with Checkpointer(tmp_path / "run") as first:
        first.prepare(STATE)
        second = Checkpointer(tmp_path / "run")
        second._store.ops = Tidied()
        with pytest.raises(RunLocked):
            second.prepare(STATE)


def test_a_read_only_file_system_says_so(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunPathError, match="read-only"):
        Checkpointer(small_disk / "run").save(1, STATE)


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with Checkpointer(tmp_path / "run") as run:
            path = Path(run.save(1, STATE).result().path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


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
    assert list((tmp_path / "run").glob(".damaged-step-00000002-*"))
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
    owned, other = torch.randn(1000), torch.randn(1_000_000)  # too large to be cloned instead
    ops = FaultyOps()
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=512 << 10)) as run:
        optimizer = torch.optim.SGD([owned], lr=0.1)
        run.watch(optimizer)
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
        assert len(slots) == 2, "the training thread copied on, or nothing"
        monkeypatch.undo()
        run.save(3, {"owned": owned, "other": other}).result(30)
