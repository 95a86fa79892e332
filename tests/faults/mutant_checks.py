"""Checks that planted bugs have to be caught by: each a plain function of an empty directory that raises AssertionError
where a promise is broken, and passes where the library is as it should be."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.model_scenarios import SCENARIOS
from support.options import by_stage

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    InvalidOption,
    KeepLast,
    NoUsableCheckpoint,
    Run,
    RunLocked,
    RunOptions,
    Safetensors,
    StepExists,
    WriterOptions,
)
from asyncckpt.errors import AsyncCkptError, LeaseLost
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import FaultyOps, check_trace

Check = Callable[[Path], None]
_BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def model(name: str) -> Check:
    """Every crash state of a scenario."""

    def check(root: Path) -> None:
        scenario = _BY_NAME[name]
        outcome = check_trace(scenario.recovery(scenario.record(root).trace()), most_violations=1)
        assert not outcome.violations, outcome.violations[0]

    check.__name__ = f"model: {name}"
    return check


#: Every state of the disk that a crash leaves, of what a scenario does.
ONE, TWO, AGAIN = model("one save"), model("two saves, retention"), model("a step saved again")
LARGE, ZARR, REFLINKS = model("large shards"), model("zarr"), model("reflinks")
LINKS, PARENTS = model("links and retention"), model("parents made")
BACK, BACK_KILLED = model("a step saved again after going back"), model("killed while a step made way")
NAMED = model("assets, and a name that moves")
RENAMED, MADE = model("killed after the rename, then pruned"), model("killed when the run was made")


def _state(step: int, size: int = 1100) -> dict[str, Any]:
    return {"w": torch.full((size,), step + 0.5), "still": torch.arange(size) + 0.5, "meta": {"step": step}}


def _saved(path: Path, *steps: int, size: int = 1100, **options: Any) -> None:
    with Checkpointer(path, **by_stage(**options)) as run:
        for step in steps:
            run.save(step, _state(step, size)).result()


def _holds(path: Path, step: int, size: int = 1100) -> None:
    """The checkpoint verifies, and is that step's, bit for bit."""
    run = Run(path)
    found = _state(-1, size)
    entry = next((entry for entry in run.ls() if entry.step == step), None)
    assert entry is not None, f"step {step} is gone"
    assert entry.damage is None, entry.damage
    assert run.verify(step) == [], run.verify(step)[0]
    run.restore(found, step)
    expected = _state(step, size)
    assert found["meta"] == expected["meta"]
    assert all(torch.equal(found[name], expected[name]) for name in ("w", "still")), "it holds something else"


def order_is_the_documented_one(root: Path) -> None:
    """Everything else is durable before the manifest is begun, and the manifest before the rename."""
    trace = _BY_NAME["one save"].record(root).trace()
    number = {(event.kind, os.path.basename(event.path), event.key[3]): n for n, event in enumerate(trace.events)}
    manifest = number["create", "manifest.json", 1]
    for n, event in enumerate(trace.events):
        if event.kind == "fsync" and not event.path.endswith("manifest.json") and "step" not in event.path:
            assert trace.before[manifest] >> n & 1, f"{event} does not come before the manifest"
    folders = [n for n, e in enumerate(trace.events) if e.kind == "fsync_directory" and ".tmp-" in e.path]
    assert any(trace.before[manifest] >> n & 1 for n in folders), "the directory is not durable before the manifest"


def _failing(call: str, calls: int) -> Check:
    """Each of the calls of a save, failing once, must fail the save, and cost nothing that was there."""

    def check(root: Path) -> None:
        for nth in range(1, calls + 1):
            _fail_once(root / str(nth), call, nth)

    check.__name__ = f"a failing {call}"
    return check


def failing_fsync(root: Path) -> None:
    """Likewise, of every file by name: which comes first is chance."""
    for number, file in enumerate(("w-", "still-", "state.json", "manifest.json")):
        _fail_once(root / str(number), "fsync", 1, file)


class _Choosy(FaultyOps):
    """Fails calls on files whose names begin with ``file`` only."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def _call(self, name: str, subject: object) -> None:
        if os.path.basename(str(subject)).startswith(self.file):
            super()._call(name, subject)


def _fail_once(path: Path, call: str, nth: int, file: str = "") -> None:
    run = Checkpointer(path, files=Safetensors(extent_bytes=256 << 10), writer=WriterOptions(reuse_unchanged=False))
    run.save(1, _state(1, 100_000)).result()
    run.wait()
    run._store.ops = ops = _Choosy(file)
    ops.fail = (call, nth, errno.EIO)
    try:
        error = run.save(2, _state(2, 100_000)).exception(60)
    finally:
        ops.fail = None
        with contextlib.suppress(AsyncCkptError):
            run.close()
    assert ops.seen >= nth, "the call was never made"
    assert error is not None, f"{call} {nth} failed and the save was acknowledged"
    _holds(path, 1, 100_000)
    for entry in Run(path).ls():
        assert entry.damage is None, f"a failed save is visible and torn: {entry.damage}"


failing_write, failing_close = _failing("pwrite", 4), _failing("close", 2)
failing_directory_sync, failing_truncate = _failing("fsync_directory", 3), _failing("truncate", 2)
failing_small_file = _failing("write_file", 2)


def short_writes(root: Path) -> None:
    run = Checkpointer(root / "run")
    run._store.ops = ops = FaultyOps()
    ops.short_writes = True
    with run:
        run.save(1, _state(1, 100_000)).result()
    _holds(root / "run", 1, 100_000)


def saves_hold_what_was_saved(root: Path) -> None:
    """Plain, encoded, chunked and taken over."""
    kinds: list[dict[str, Any]] = [{}, {"codec": "planes"}, {"format": "zarr", "codec": "planes"}]
    for number, kind in enumerate(kinds):
        path = root / str(number)
        _saved(path, 1, 2, 3, size=100_000, extent_bytes=64 << 10, **kind)
        for step in (1, 2, 3):
            _holds(path, step, 100_000)


def a_lying_device_is_found_out(root: Path) -> None:
    """What reaches the disk is not what was staged: the digests must be of the latter."""

    class Liar(PosixOps):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            if not memoryview(data).readonly:  # a shard's: the very memory that was staged, behind its header
                memoryview(data)[8000] ^= 1
            return super().pwrite(fd, data, offset)

    with Checkpointer(root / "run") as run:
        run._store.ops = Liar()
        run.save(1, _state(1)).result()
    assert Run(root / "run").verify(1), "wrong bytes were written, and they verify"


def flipped_bits_are_found(root: Path) -> None:
    """One bit in each extent of each file, and in each digit of ``state.json``; size and times as they were."""
    _saved(root / "run", 1, size=40_000, extent_bytes=32 << 10, format="safetensors")
    run = Run(root / "run")
    folder = Path(run.ls()[0].path)
    for file in sorted(folder.iterdir()):
        good, times = file.read_bytes(), file.stat()
        digits = [at for at, byte in enumerate(good) if file.name == "state.json" and chr(byte).isdigit()]
        for at in {0, len(good) // 2, len(good) - 1, *digits}:  # a digit becomes another: that is still valid JSON
            bad = bytearray(good)
            bad[at] ^= 4
            file.write_bytes(bad)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            entry = run.ls()[0]
            assert entry.damage is not None or run.verify_entry(entry), f"bit of {file.name} at {at}: nobody noticed"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(AsyncCkptError):
                    run.restore(_state(-1, 40_000))
                    raise AssertionError(f"bit of {file.name} at {at}: restored all the same")
        file.write_bytes(good)


def foreign_files_and_stale_copies_are_refused(root: Path) -> None:
    _saved(root / "run", 1, 2)
    run = Run(root / "run")
    (root / "run" / "step-00000001" / "extra-00001-of-00001.safetensors").write_bytes(b"x")
    assert run.verify(1) == [], "a file of somebody else's is taken for damage"
    assert run.ls()[0].extra == ("extra-00001-of-00001.safetensors",), "a file too many, and nobody is told"
    shutil.rmtree(root / "run" / "step-00000001")
    shutil.copytree(root / "run" / "step-00000002", root / "run" / "step-00000009")
    shutil.copytree(root / "run" / "step-00000002", root / "run" / "paper")
    found = {entry.name: (entry.step, entry.renamed, entry.damage is None) for entry in run.ls()}
    assert found["paper"] == (2, True, True), "a copy is taken for the run's own"
    assert found["step-00000009"] == (9, False, False), "another step's manifest is not seen"
    with contextlib.suppress(CheckpointDamaged):
        run.restore(_state(-1), step=9)
        raise AssertionError("a copy under another step's name is taken for that step")


def a_damaged_newest_is_passed_over_loudly(root: Path) -> None:
    _saved(root / "run", 1, 2, incremental=False)
    _flip(root / "run" / "step-00000002")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = Run(root / "run").restore(state := _state(-1))
    assert report.step == 1
    assert state["meta"] == {"step": 1}
    assert any(issubclass(warning.category, RuntimeWarning) for warning in heard), "and nobody was told"


def a_run_without_a_usable_checkpoint_does_not_start_anew(root: Path) -> None:
    _saved(root / "run", 1)
    _flip(root / "run" / "step-00000001")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Checkpointer(root / "run") as run:
            try:
                step = run.resume(_state(-1))
            except NoUsableCheckpoint:
                return
    raise AssertionError(f"resumed from step {step} without a word")


def _flip(folder: Path) -> None:
    file = folder / "still-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    os.unlink(file)  # not the blocks that another checkpoint may share
    file.write_bytes(data)


def damage_to_a_linked_file_does_not_live_on(root: Path) -> None:
    _saved(root / "run", 1, 2)
    with (root / "run" / "step-00000002" / "still-00001-of-00001.safetensors").open("r+b") as shared:
        shared.seek(-3, os.SEEK_END)
        shared.write(b"\xff")
    with Checkpointer(root / "run") as run:
        run.save(3, _state(3)).result()
    _holds(root / "run", 3)


def what_training_left_is_marked(root: Path) -> None:
    """And a restore of a part, or one through ``Run``, makes nothing of it."""
    _saved(root / "run", 1, 2, 3)
    with Checkpointer(root / "run") as run:
        run.restore(_state(-1), step=1)
        run.restore(_state(-1), step=2, include=["w"])
        Run(root / "run").restore(_state(-1), step=3)
        run.save(4, _state(4)).result()
    entries = {entry.step: entry for entry in Run(root / "run").ls()}
    assert entries[4].parent == entries[1].attempt, "it names another parent"
    assert [step for step, entry in entries.items() if entry.abandoned] == [2, 3], "and nobody is told"


def nothing_is_taken_over_from_a_damaged_checkpoint(root: Path) -> None:
    _saved(root / "run", 1, 2)
    _flip(root / "run" / "step-00000002")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Checkpointer(root / "run") as run:
            assert run.resume(_state(-1)) == 1
            run.save(3, _state(3)).result()
    _holds(root / "run", 3)


def retention_keeps_what_it_must(root: Path) -> None:
    """The newest, the pinned one, the one that is being read."""
    _saved(root / "run", 1, 2, 3, 4)
    Run(root / "run").pin(2)
    with contextlib.closing(Run(root / "run").open(3)), Checkpointer(root / "run", keep=KeepLast(1)) as run:
        run.prune()
    assert [entry.step for entry in Run(root / "run").ls()] == [2, 3, 4]
    for step in (2, 3, 4):
        _holds(root / "run", step)


def nothing_is_ever_overwritten(root: Path) -> None:
    """Neither an attempt's directory nor a name that is taken."""
    with Checkpointer(root / "run") as run:
        run.save(1, _state(1)).result()
        (root / "run" / "step-00000002").mkdir()
        (root / "run" / "step-00000002" / "notes").write_bytes(b"of somebody else")
        assert isinstance(run.save(2, _state(2)).exception(60), StepExists)
        assert os.listdir(root / "run" / "step-00000002") == ["notes"]
        run._store.begin(3, "0" * 32)
        with contextlib.suppress(FileExistsError):
            run._store.begin(3, "0" * 32)
            raise AssertionError("an attempt's directory was used twice")


def a_live_run_keeps_its_attempts(root: Path) -> None:
    with Checkpointer(root / "run") as run:
        run.save(1, _state(1)).result()
        directory = run._store.begin(2, "0" * 32)
        second = Checkpointer(root / "run")
        with contextlib.suppress(RunLocked):
            second.save(3, _state(3)).result()
        with contextlib.suppress(AsyncCkptError):
            second.close()
        assert os.path.isdir(directory.path), "another process deleted a live attempt"


def a_run_that_was_cut_off_publishes_nothing(root: Path) -> None:
    first = Checkpointer(root / "run")
    first.save(1, _state(1)).result()
    with Checkpointer(root / "run", run=RunOptions(takeover=True)) as second:
        second.save(2, _state(2)).result()
        error = first.save(3, _state(3)).exception(60)
        with contextlib.suppress(AsyncCkptError):
            first.close()
        assert isinstance(error, LeaseLost), f"step 3 was published beside another run ({error!r})"


def errors_are_reported_once_and_in_time(root: Path) -> None:
    """A background save that failed and that nobody asked about is raised by the next call."""
    run = Checkpointer(root / "run", writer=WriterOptions(reuse_unchanged=False))
    run.save(1, _state(1)).result()
    run._store.ops = ops = FaultyOps()
    ops.fail = ("fsync", 1, errno.EIO)
    pending = run.save(2, _state(2))
    while not pending.done():
        pending.staged()
        run._committer.wait_below(1, 60)
    ops.fail = None
    try:
        run.wait()
    except AsyncCkptError:
        return
    finally:
        with contextlib.suppress(AsyncCkptError):
            run.close()
    raise AssertionError("a failed save was never reported")


def what_was_saved_last_is_the_newest(root: Path) -> None:
    """After going back, for a restore and for retention, in this process and in a new one."""
    _saved(root / "run", 1, 2, 3, 4)
    with Checkpointer(root / "run", keep=KeepLast(2)) as run:
        run.restore(_state(-1), step=1)
        run.save(2, _state(12)).result()
        run.wait()
        assert [entry.step for entry in run.ls()] == [4, 2]
    for restore in (Run(root / "run").restore, Checkpointer(root / "run").restore):
        restore(found := _state(-1))
        assert found["meta"] == {"step": 12}


def a_failed_save_replaces_nothing(root: Path) -> None:
    _saved(root / "run", 1, 2)
    with contextlib.suppress(AsyncCkptError), Checkpointer(root / "run") as run:
        run.restore(_state(-1), step=1)
        run._store.ops = ops = FaultyOps()
        ops.fail = ("rename_noreplace", 2, errno.EIO)  # the first makes room
        assert run.save(2, _state(12)).exception(60) is not None
        ops.fail = None
        _holds(root / "run", 2)


def what_others_made_stays(root: Path) -> None:
    """A checkpoint that was renamed, a copy of one, and what only looks like a leftover."""
    _saved(root / "run", 1, 2)
    (root / "run" / "step-00000001").rename(root / "run" / "best")
    shutil.copytree(root / "run" / "step-00000002", root / "run" / "copy")
    (root / "run" / ".tmp-mydata").mkdir()
    _saved(root / "run", 3, 4, keep=KeepLast(1))
    there = set(os.listdir(root / "run"))
    assert {"best", "copy", ".tmp-mydata", "step-00000004"} <= there, f"something of somebody else's is gone: {there}"


def assets_are_what_was_given(root: Path) -> None:
    """They are those of their checkpoint, listed and verified; what takes the place of a file of ours is refused."""
    path = root / "run"
    with Checkpointer(path, assets={"config.json": b"{}", "a.txt": b"all"}) as run:
        with contextlib.suppress(InvalidOption):
            run.save(1, _state(1), assets={"state.json": b"{}"}).result()
            raise AssertionError("an asset took the place of the state")
        run.save(1, _state(1), assets={"a.txt": b"own"}).result()
    assert Run(path).assets(1) == {"config.json": b"{}", "a.txt": b"own"}
    assert Run(path).ls()[0].extra == ()
    file = path / "step-00000001" / "config.json"
    file.write_bytes(b"[]")
    assert Run(path).verify(1) != []
    with contextlib.suppress(CheckpointDamaged):
        Run(path).assets(1)
        raise AssertionError("a damaged asset was handed out")


def a_name_means_what_was_saved_last(root: Path) -> None:
    """Of those that have it: it means no other one because a newer one is damaged, or because retention came by."""
    path = root / "run"
    with Checkpointer(path, keep=KeepLast(1)) as run:
        for step in (1, 2):
            run.save(step, _state(step), name=f"epoch={step}").result()
            run.save(step, _state(step), name=["last", "best"]).result()
        run.save(3, _state(3), name="last").result()
        run.wait()
        for name, step in (("best", 2), ("last", 3)):
            found = _state(-1)
            assert run.restore(found, name).step == step == found["meta"]["step"]
    (path / "step-00000003" / "state.json").unlink()
    with Checkpointer(path) as run:
        run.save(4, _state(4), name="best").result()
        with contextlib.suppress(CheckpointDamaged):
            found = run.restore(_state(-1), "last")
            raise AssertionError(f"'last' came to mean step {found.step}")
    _flip(path / "step-00000004")
    (path / "step-00000004" / "state.json").unlink()
    with contextlib.suppress(CheckpointDamaged):
        found = Run(path).restore(_state(-1), "best")
        raise AssertionError(f"'best' came to mean step {found.step}")
