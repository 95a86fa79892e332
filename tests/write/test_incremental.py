"""What did not change is taken over from the checkpoint before, and every checkpoint stays complete by itself."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny, bits, train
from support.examples import thinned
from support.options import by_stage

from asyncckpt import AsyncCkptError, Checkpointer, KeepLast, Run, Safetensors, SaveReport, WriterOptions
from asyncckpt.codecs import codecs
from asyncckpt.codecs.codecs import Planes
from asyncckpt.storage.posix import PosixOps

KINDS = list(itertools.product(["safetensors", "zarr"], ["none", "planes"]))
kinds = pytest.mark.parametrize(("shard_format", "codec"), KINDS, ids=str)
#: Of a checkpoint without a change: the metadata and the manifest.
SMALL_BYTES = 64 << 10


def _state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "same": torch.randn(100_000, generator=generator),
        "big": torch.randn(400, 512, generator=generator),
        "tiny": torch.arange(9),
        "plain": {"lr": 0.1},
    }


def _files(path: str | Path) -> dict[str, Path]:
    root = Path(path)
    return {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}


def _data_files(path: str | Path) -> dict[str, Path]:
    small = ("manifest.json", "state.json", "zarr.json", ".index.json")
    return {name: file for name, file in _files(path).items() if not name.endswith(small)}


def _shared(run: Checkpointer, old: str, new: str) -> set[str]:
    """The data files that two checkpoints share, by name. Where files share blocks instead, all of equal content."""
    before, after = _data_files(old), _data_files(new)
    names = before.keys() & after.keys()
    if run._store.reflinks:
        return {name for name in names if before[name].read_bytes() == after[name].read_bytes()}
    return {name for name in names if before[name].samefile(after[name])}


def _component(name: str) -> str:
    return name.partition("/")[0] if "/" in name else name.rpartition("-of-")[0].rpartition("-")[0]


def _save(run: Checkpointer, step: int, state: dict[str, Any], **options: Any) -> SaveReport:
    """Save, and wait until the next save can build on it."""
    report = run.save(step, state, **options).result()
    run.wait()
    return report


def _good(path: str | Path, step: int, state: dict[str, Any]) -> None:
    """The checkpoint verifies, and holds exactly ``state``."""
    run = Run(path)
    assert run.verify(step) == []
    live = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else type(value)()
        for name, value in state.items()
    }
    run.restore(live, step)
    assert bits(live) == bits(state)


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


# -- taking files over -------------------------------------------------------------------------------------------------


@kinds
def test_unchanged_files_are_links_and_changed_ones_are_not(shard_format: str, codec: str, tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = _save(run, 1, state)
        before = bits(state)
        state["big"][7, 7] += 1
        second = _save(run, 2, state)
        shared = {_component(name) for name in _shared(run, first.path, second.path)}
        assert shared == {"same", "tiny"}
        changed = sum(f.stat().st_size for n, f in _data_files(second.path).items() if _component(n) == "big")
        assert changed <= second.written_bytes <= changed + SMALL_BYTES
        third = _save(run, 3, state)
        assert _shared(run, second.path, third.path) == _data_files(second.path).keys()
        assert third.written_bytes < SMALL_BYTES < third.nbytes
        assert first.written_bytes == first.nbytes
    _good(tmp_path / "run", 3, state)
    _good(tmp_path / "run", 2, state)
    live = {name: torch.zeros_like(value) for name, value in _state().items() if isinstance(value, torch.Tensor)}
    Run(tmp_path / "run").restore(live, 1)
    assert bits(live) == {name: before[name] for name in live}, "a later save changed an earlier checkpoint"


@kinds
def test_frozen_parameters_are_in_shards_of_their_own_and_stay_there(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Tiny(160)  # its matrices are large enough to be encoded
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        train(model, optimizer)
        first = _save(run, 1, state)
        with run.open(1) as checkpoint:
            tensors = checkpoint.manifest.components["model"].tensors
        frozen = {file for name, tensor in tensors.items() if name.startswith("frozen.") for file in tensor.files}
        live = {file for name, tensor in tensors.items() if not name.startswith("frozen.") for file in tensor.files}
        assert frozen
        assert live
        assert not frozen & live
        train(model, optimizer)
        second = _save(run, 2, state)
        assert _shared(run, first.path, second.path) >= frozen
        other = Tiny(160)
        run.restore({"model": other}, 2)
        assert bits(other) == bits(model)
        # training goes on with them: the layout changes, and nothing is mixed up
        model.frozen.requires_grad_(True)
        _save(run, 3, state)
        for step in (1, 2, 3):
            assert run.verify(step) == []
        run.restore({"model": other}, 3)
        assert bits(other) == bits(model)


@kinds
def test_a_checkpoint_does_not_need_the_one_it_was_linked_from(shard_format: str, codec: str, tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = _save(run, 1, state)
        state["tiny"] += 1
        _save(run, 2, state)
    shutil.rmtree(first.path)
    _good(tmp_path / "run", 2, state)
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, keep=KeepLast(1))) as run:
        for step in (3, 4, 5):
            state["tiny"] += 1
            report = _save(run, step, state)
            assert report.written_bytes < report.nbytes / 2
            assert [entry.step for entry in run.ls()] == [step]
            _good(tmp_path / "run", step, state)


@kinds
def test_the_first_save_after_a_resume_takes_over_what_is_on_disk(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = _save(run, 1, state)
    live = {name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else {} for name, value in state.items()}
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        assert run.resume(live) == 1
        live["same"][5] = 0
        second = _save(run, 2, live)
        assert {_component(name) for name in _shared(run, first.path, second.path)} == {"big", "tiny"}
    _good(tmp_path / "run", 2, live)


def test_weights_only_checkpoints_are_compared_with_their_like(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    state = {"model": model, "count": torch.zeros(3)}
    with Checkpointer(tmp_path / "run") as run:
        _save(run, 1, state)
        weights = _save(run, 2, state, weights_only=True)
        _save(run, 3, state)
        again = _save(run, 4, state, weights_only=True)
        assert _shared(run, weights.path, again.path)
        for entry in run.ls():
            assert run.verify_entry(entry) == []


def test_incremental_false_writes_everything(tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", writer=WriterOptions(reuse_unchanged=False)) as run:
        first = _save(run, 1, state)
        second = _save(run, 2, state)
        assert second.written_bytes == second.nbytes
        assert all(file.stat().st_nlink == 1 for file in _data_files(second.path).values())
        assert not any(file.samefile(_data_files(second.path)[name]) for name, file in _data_files(first.path).items())
    _good(tmp_path / "run", 2, state)


@kinds
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.view(torch.int32),
        lambda t: t.reshape(300, 200),
        lambda t: t[:100].contiguous(),
        lambda t: torch.cat([t, t]),
    ],
    ids=["dtype", "shape", "shorter", "longer"],
)
def test_the_same_bytes_under_another_description_are_restored_as_described(
    change: Callable[[torch.Tensor], torch.Tensor], shard_format: str, codec: str, tmp_path: Path
) -> None:
    one = {"w": torch.randn(200, 300)}
    other = {"w": change(one["w"])}
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=32 << 10)) as run:
        _save(run, 1, one)
        _save(run, 2, other)
    _good(tmp_path / "run", 1, one)
    _good(tmp_path / "run", 2, other)


@pytest.mark.parametrize("shard_format", ["safetensors", "zarr"])
def test_another_codec_or_format_takes_nothing_over_that_it_could_not_read(shard_format: str, tmp_path: Path) -> None:
    state = _state()
    step = 0
    for codec in ("none", "planes", "zstd", codecs.Zstd(level=3), "lz4", "none", "planes"):
        step += 1
        with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
            _save(run, step, state)
        _good(tmp_path / "run", step, state)
    for other in ("zarr", "safetensors"):
        step += 1
        with Checkpointer(tmp_path / "run", **by_stage(format=other, codec="planes")) as run:
            _save(run, step, state)
        _good(tmp_path / "run", step, state)


# -- copying over ------------------------------------------------------------------------------------------------------

#: One tensor of many extents: small ones, which are stored as they are, and ones that a codec shrinks.
EXTENTS = [4096, 32 << 10]


def _long() -> dict[str, Any]:
    return {"w": torch.randn(64 * 4096, generator=torch.Generator().manual_seed(4)), "n": torch.arange(3)}


@pytest.mark.parametrize(
    ("changed", "extent_bytes", "shard_format", "codec"),
    thinned(((*cell, *kind) for *cell, kind in itertools.product([-1, 0, 64 * 2048], EXTENTS, KINDS)), 3),
)
def test_a_shard_in_which_one_extent_changed_is_written_whole_and_correct(
    changed: int, extent_bytes: int, shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = _long()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=extent_bytes)) as run:
        first = _save(run, 1, state)
        run._store.ops = ops = CountedReads()
        state["w"][changed] += 1
        second = _save(run, 2, state)
        if changed:  # most of it matched before the one that did not came along
            assert ops.read_bytes > 100_000, "nothing was copied over"
        assert {_component(name) for name in _shared(run, first.path, second.path)} == {"n"}
        third = _save(run, 3, state)
        assert third.written_bytes < SMALL_BYTES
    _good(tmp_path / "run", 2, state)
    _good(tmp_path / "run", 3, state)
    state["w"][changed] -= 1
    assert Run(tmp_path / "run").verify(1) == []


@pytest.mark.parametrize(
    ("extent_bytes", "shard_format", "codec"),
    thinned(((extent, *kind) for extent, kind in itertools.product(EXTENTS, KINDS)), 3),
)
def test_where_links_are_refused_everything_is_written(
    extent_bytes: int, shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = _state() | _long()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=extent_bytes)) as run:
        run._store.ops = NoLinks()
        first = _save(run, 1, state)
        for step in (2, 3):
            report = _save(run, step, state)
            assert report.written_bytes == report.nbytes
            assert not _shared_inodes(first.path, report.path)
            _good(tmp_path / "run", step, state)
        state["w"][-1] += 1
        _save(run, 4, state)
        _good(tmp_path / "run", 4, state)


def _shared_inodes(one: str, other: str) -> set[int]:
    return {file.stat().st_ino for file in _files(one).values()} & {
        file.stat().st_ino for file in _files(other).values()
    }


def test_a_file_with_too_many_links_is_written_and_the_next_save_links_to_that(tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run") as run:
        _save(run, 1, state)
        run._store.ops = refusing = NoLinks(errno.EMLINK)
        second = _save(run, 2, state)
        assert refusing.asked
        assert second.written_bytes == second.nbytes
        run._store.ops = PosixOps()
        third = _save(run, 3, state)
        assert third.written_bytes < SMALL_BYTES
        assert _shared_inodes(second.path, third.path)
    _good(tmp_path / "run", 3, state)


@kinds
def test_a_file_system_that_shares_blocks_gives_every_checkpoint_files_of_its_own(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    class Blocks(PosixOps):
        def reflink(self, source: str, target: str) -> None:
            shutil.copyfile(source, target)

    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        run._store.ops = Blocks()
        first = _save(run, 1, state)
        second = _save(run, 2, state)
        assert second.written_bytes < SMALL_BYTES
    for file in _data_files(first.path).values():
        file.write_bytes(b"")
    _good(tmp_path / "run", 2, state)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["link", "reflink"])
def test_a_link_that_fails_for_no_good_reason_fails_the_save(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(code, os.strerror(code))

    state = {"w": torch.randn(1000), "plain": 1}
    with Checkpointer(tmp_path / "run") as run:
        _save(run, 1, state)
        ops = PosixOps()
        monkeypatch.setattr(ops, call, refuse)
        run._store.ops, run._store.reflinks = ops, call == "reflink"
        error = run.save(2, state).exception()
        assert isinstance(error, AsyncCkptError)
        assert "step 2" in str(error)
        run._store.ops = PosixOps()
        assert [entry.step for entry in run.ls()] == [1]
        _save(run, 3, state)
    _good(tmp_path / "run", 3, state)


# -- the checkpoint before changes behind our back ---------------------------------------------------------------------


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
    state = _long()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=32 << 10)) as run:
        first = _save(run, 1, state)
        [file] = [file for name, file in _data_files(first.path).items() if _component(name) == "w"]
        DAMAGES[damage](file)
        if not linking:
            state["w"][-1] += 1
        error = run.save(2, state).exception()
        if error is not None:
            assert isinstance(error, AsyncCkptError), f"untyped: {error!r}"
            assert 2 not in {entry.step for entry in run.ls()}
        elif linking and run.verify(2):
            # one file of two names: what is wrong with it was wrong before, is seen, and is nowhere else
            assert _shared(run, first.path, str(tmp_path / "run" / "step-00000002"))
            assert {entry.file for entry in run.verify(2)} == {str(file.relative_to(first.path))}
            return
        else:
            _good(tmp_path / "run", 2, state)
        _save(run, 3, state)
        _good(tmp_path / "run", 3, state)
        assert run.verify(1), "the damage must not be covered up"


@pytest.mark.parametrize("linking", [True, False], ids=["linking", "copying"])
@pytest.mark.parametrize("damage", [DAMAGES["cut"], DAMAGES["deleted"]], ids=["cut", "deleted"])
def test_a_save_that_fails_for_damage_to_the_one_before_names_both_and_says_what_to_do(
    damage: Callable[[Path], object], linking: bool, tmp_path: Path
) -> None:
    state = _long()
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=32 << 10)) as run:
        first = _save(run, 1, state)
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
        _save(run, 1, state)
        state["w"] += 1
        ops = Noticing()
        pending = run.save(2, state)
        pending.add_done_callback(lambda _: ops.decided.wait(30))  # holds the committer's thread
        second = pending.result()
        run._store.ops = ops
        third = run.save(3, state).result()
        assert _shared(run, second.path, third.path)
        assert third.written_bytes < SMALL_BYTES


@kinds
def test_where_the_checkpoint_before_is_gone_everything_is_written(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = _save(run, 1, state)
        shutil.rmtree(first.path)
        second = _save(run, 2, state)
        assert second.written_bytes == second.nbytes
        _good(tmp_path / "run", 2, state)
        third = _save(run, 3, state)
        assert third.written_bytes < SMALL_BYTES


def test_nothing_is_taken_over_from_a_checkpoint_that_was_found_damaged(tmp_path: Path) -> None:
    state = {"w": torch.randn(100_000)}
    with Checkpointer(tmp_path / "run") as run:
        _save(run, 1, state)
        state["w"] += 1
        second = _save(run, 2, state)
        _flip(Path(second.path) / "w-00001-of-00001.safetensors")
        with pytest.warns(RuntimeWarning, match="step-00000002 cannot be used"):
            assert run.resume({"w": torch.zeros(100_000)}) == 1
        _save(run, 2, state)  # what training came to again
        _good(tmp_path / "run", 2, state)


@kinds
def test_a_step_that_is_saved_again_may_take_over_what_it_replaces(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, overwrite=True)) as run:
        _save(run, 1, state)
        for value in (1, 0, 1):
            state["tiny"][0] += value
            assert _save(run, 1, state).written_bytes < SMALL_BYTES
            _good(tmp_path / "run", 1, state)


def test_after_a_failed_save_the_one_before_it_is_compared_with(tmp_path: Path) -> None:
    class Failing(PosixOps):
        def fsync_directory(self, path: str) -> None:
            raise OSError(errno.EIO, "failed on purpose")

    state = _state()
    with Checkpointer(tmp_path / "run") as run:
        first = _save(run, 1, state)
        run._store.ops = Failing()
        state["big"] += 1
        assert run.save(2, state).exception() is not None
        run._store.ops = PosixOps()
        third = _save(run, 3, state)
        assert {_component(name) for name in _shared(run, first.path, third.path)} == {"same", "tiny"}
    _good(tmp_path / "run", 3, state)


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
    state = _state()
    with Checkpointer(tmp_path / "run") as run:
        first = _save(run, 1, state)
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
        _good(tmp_path / "run", 2, state)


# -- chunks that lie in another order than the layout's ----------------------------------------------------------------


class LateFirst(Planes):
    """``planes`` whose first chunk is ready only after so many others: they cannot all wait for it."""

    def __init__(self, others: int) -> None:
        object.__setattr__(self, "_first", threading.Semaphore(1))
        object.__setattr__(self, "_others", threading.Semaphore(0))
        object.__setattr__(self, "_count", others)

    def encode_if_smaller(self, data: Any, item_bytes: int, out: Any) -> int:
        if self._first.acquire(blocking=False):
            for _ in range(self._count):
                assert self._others.acquire(timeout=60)
        else:
            self._others.release()
        return super().encode_if_smaller(data, item_bytes, out)


@pytest.fixture(params=["safetensors", "zarr"])
def disordered(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """A checkpoint with a file in which the first chunk is not the first, as where memory is short."""
    monkeypatch.setattr("asyncckpt.write.reorder_buffer._MAX_COPIED_BYTES", 0)
    state = {"w": torch.randn(128, 8192, generator=torch.Generator().manual_seed(5))}
    with Checkpointer(
        tmp_path / "run",
        **by_stage(format=request.param, codec=LateFirst(100), extent_bytes=32 << 10, staging_bytes=1 << 20),
    ) as run:
        path = _save(run, 1, state).path
    with Run(tmp_path / "run").open(1) as checkpoint:
        manifest = checkpoint.manifest
    [tensor] = manifest.components["w"].tensors.values()
    [part] = tensor.parts
    assert part.extents != tuple(sorted(part.extents)), "the chunks lie in order: this tests nothing"
    assert len(part.extents) == 128
    yield tmp_path / "run", request.param, state
    assert Path(path).exists()


def test_chunks_in_any_order_are_found(disordered: tuple[Path, str, dict[str, Any]]) -> None:
    path, shard_format, state = disordered
    _good(path, 1, state)
    if shard_format == "zarr":
        zarr = pytest.importorskip("zarr")
        array = zarr.open_group(path / "step-00000001", mode="r")["w/value"]
        assert array[:].tobytes() == state["w"].numpy().tobytes()


@pytest.mark.parametrize("changed", [None, 0, 127])
def test_chunks_in_any_order_are_taken_over(disordered: tuple[Path, str, dict[str, Any]], changed: int | None) -> None:
    path, shard_format, state = disordered
    with Checkpointer(path, **by_stage(format=shard_format, codec="planes", extent_bytes=32 << 10)) as run:
        if changed is not None:
            state["w"][changed, 5] += 1
        second = _save(run, 2, state)
        shared = _shared(run, str(path / "step-00000001"), second.path)
        assert bool(shared) == (changed is None)
        third = _save(run, 3, state)
        assert third.written_bytes < SMALL_BYTES
    _good(path, 2, state)
    _good(path, 3, state)


@kinds
def test_a_long_run_of_small_changes_keeps_every_checkpoint_as_it_was(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(6)
    state = _state() | _long()
    saved = {}
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, extent_bytes=16 << 10)) as run:
        for step in range(1, 9):
            for name in random.choice(["same", "big", "w", "n"], size=random.integers(0, 3)):
                flat = state[name].view(-1)
                flat[int(random.integers(len(flat)))] += 1
            run.save(step, state)
            saved[step] = bits(state)
        run.wait()
        for step, expected in saved.items():
            assert run.verify(step) == []
            live = {n: torch.zeros_like(v) if isinstance(v, torch.Tensor) else {} for n, v in state.items()}
            run.restore(live, step)
            assert bits(live) == expected
