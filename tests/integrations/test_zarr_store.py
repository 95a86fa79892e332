"""The store of a checkpoint is what zarr, dask and spawned workers expect of a read-only store.

zarr's own suite for stores runs here, where it applies. It sets the values that it reads behind the store's back; here
that is a file of a checkpoint that is made for it. What writes through the store has to be refused instead.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import multiprocessing
import pickle
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

zarr = pytest.importorskip("zarr")
pytest.importorskip("ml_dtypes")

from zarr.core.buffer import Buffer, cpu  # noqa: E402
from zarr.core.sync import sync  # noqa: E402
from zarr.testing.store import StoreTests  # noqa: E402

from asyncckpt import Checkpointer, CheckpointNotFound, DigestMismatch, InvalidOption, Run, Zarr  # noqa: E402
from asyncckpt.codecs import digests  # noqa: E402
from asyncckpt.integrations.zarr_store import CheckpointStore  # noqa: E402
from asyncckpt.manifest.records import ExtentRecord, FileRecord  # noqa: E402

VALUES = torch.arange(24.0).reshape(4, 6)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run", files=Zarr()) as run:
        run.save(1, {"part": {"w": VALUES}}).result(60)
    return tmp_path / "run" / "step-00000001"


# -- zarr's suite ------------------------------------------------------------------------------------------------------


class Served(CheckpointStore):
    """A checkpoint's store to which the suite adds files, as if they had been saved."""

    made: ClassVar[list[Served]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)

    def add(self, key: str, data: bytes) -> None:
        file = Path(self._reader.path, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        extents = (ExtentRecord(0, len(data), digests.get(self._manifest.digest)(data)),) if data else ()
        record = FileRecord(key, len(data), extents)
        self._files[key] = record
        self._manifest = dataclasses.replace(self._manifest, files=tuple(self._files.values()))


#: These write through the store, and have to be refused by it.
WRITING = re.compile(
    r"test_(set|delete|clear|list|is_empty|getsize_prefix|get_partial_values|serializable_store|exists|store_read_only)"
)


class TestCheckpointStore(StoreTests[Served, cpu.Buffer]):
    store_cls = Served
    buffer_cls = cpu.Buffer

    async def set(self, store: Served, key: str, value: Buffer) -> None:
        store.add(key, value.to_bytes())

    async def get(self, store: Served, key: str) -> Buffer:
        raise AssertionError("nothing is ever written through the store")

    @pytest.fixture(autouse=True)
    def stores_are_closed(self) -> Iterator[None]:
        yield
        while Served.made:
            Served.made.pop().close()

    @pytest.fixture
    def store_kwargs(self, checkpoint: Path) -> dict[str, Any]:
        return {"checkpoint": checkpoint}

    @pytest.fixture
    def store(self, open_kwargs: dict[str, Any]) -> Any:
        return sync(self.store_cls.open(**open_kwargs))

    @pytest.fixture
    def store_not_open(self, store_kwargs: dict[str, Any]) -> Any:
        return self.store_cls(**store_kwargs)

    def test_store_repr(self, store: Served) -> None:
        assert repr(store).startswith("CheckpointStore('/")

    def test_store_supports_writes(self, store: Served) -> None:
        assert not store.supports_writes
        assert not store.supports_deletes

    def test_store_supports_listing(self, store: Served) -> None:
        assert store.supports_listing

    @pytest.mark.parametrize("read_only", [True, False])
    def test_store_open_read_only(self, open_kwargs: dict[str, Any], read_only: bool) -> None:
        if not read_only:
            with pytest.raises(InvalidOption, match="never changed"):
                self.store_cls(**open_kwargs, read_only=False)
            return
        with sync(self.store_cls.open(**open_kwargs, read_only=True)) as store:
            assert store._is_open
            assert store.read_only


def _in_zarrs_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """Run a coroutine of the suite as an ordinary test."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        sync(test(*args, **kwargs))

    return run


for _name, _test in list(vars(StoreTests).items()):
    if not _name.startswith("test_") or _name in vars(TestCheckpointStore):
        continue
    if WRITING.match(_name):
        setattr(TestCheckpointStore, _name, None)
    elif inspect.iscoroutinefunction(_test):
        setattr(TestCheckpointStore, _name, _in_zarrs_loop(_test))


# -- what the suite would write ----------------------------------------------------------------------------------------


async def _all(found: AsyncIterator[str]) -> list[str]:
    return sorted([one async for one in found])


def test_what_is_in_a_checkpoint_is_listed_and_sized(checkpoint: Path) -> None:
    with CheckpointStore(checkpoint) as store:
        files = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
        files.remove("manifest.json")
        assert sync(_all(store.list())) == files
        assert sync(_all(store.list_prefix("part/w/"))) == ["part/w/c.0.0", "part/w/zarr.json"]
        assert sync(_all(store.list_dir(""))) == ["part", "zarr.json"]
        assert sync(_all(store.list_dir("part/"))) == ["w", "zarr.json"]
        assert sync(store.getsize("part/w/c.0.0")) == (checkpoint / "part/w/c.0.0").stat().st_size
        assert sync(store.getsize_prefix("part/w")) == sum(
            (checkpoint / "part/w" / name).stat().st_size for name in ("c.0.0", "zarr.json")
        )
        assert not sync(store.is_empty("part"))
        assert sync(store.is_empty("other"))
        assert sync(store.exists("zarr.json"))
        assert not sync(store.exists("other/zarr.json"))


def test_writing_is_refused_and_changes_nothing(checkpoint: Path) -> None:
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    value = cpu.Buffer.from_bytes(b"1")
    with CheckpointStore(checkpoint) as store:
        for write in (
            lambda: store.set("zarr.json", value),
            lambda: store.set_if_not_exists("new", value),
            lambda: store.delete("zarr.json"),
            lambda: store.delete_dir("part"),
        ):
            with pytest.raises((ValueError, NotImplementedError)):
                sync(write())
        with pytest.raises((ValueError, NotImplementedError)):
            sync(store.clear())
    assert {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()} == before


def test_a_closed_store_reads_nothing_and_holds_nothing(checkpoint: Path) -> None:
    store = CheckpointStore(checkpoint)
    group = zarr.open_group(store, mode="r")
    assert np.array_equal(group["part/w"][:], VALUES)
    store.close()
    store.close()
    with pytest.raises(InvalidOption, match="closed"):
        group["part/w"][:]
    with Checkpointer(checkpoint.parent) as run:  # a reader's lock would keep the checkpoint
        run.save(2, {"part": {"w": VALUES}}).result(60)
    opened = Run(checkpoint.parent).open(1)
    with opened:
        CheckpointStore(opened).close()
        assert zarr.open_group(CheckpointStore(opened), mode="r")["part/w"][0, 1] == 1, "the caller's own is not closed"


def _read(store: CheckpointStore, answers: Any) -> None:
    with store:
        answers.put(zarr.open_group(store, mode="r")["part/w"][:].tolist())


def test_a_pickled_store_opens_the_same_checkpoint_or_none(checkpoint: Path) -> None:
    with CheckpointStore(checkpoint) as store:
        data = pickle.dumps(store)
        with pickle.loads(data) as again:
            assert again == store
            assert again.read_only
            assert np.array_equal(zarr.open_group(again, mode="r")["part/w"][:], VALUES)
        del again
    from asyncckpt import RunOptions

    with Checkpointer(checkpoint.parent, files=Zarr(), run=RunOptions(overwrite=True)) as run:
        run.save(1, {"part": {"w": VALUES + 1}}).result(60)
    with pytest.raises(DigestMismatch):
        pickle.loads(data)
    checkpoint.rename(checkpoint.with_name("elsewhere"))
    with pytest.raises(CheckpointNotFound):
        pickle.loads(data)


@pytest.mark.slow
def test_a_spawned_worker_reads_through_its_own_copy(checkpoint: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with CheckpointStore(checkpoint) as store:
        worker = context.Process(target=_read, args=(store, answers))
        worker.start()
        assert answers.get(timeout=120) == VALUES.tolist()
        worker.join(60)
    assert worker.exitcode == 0
