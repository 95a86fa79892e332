"""A run is where its address says; a run in a bucket is a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits

import asyncckpt
from asyncckpt import Checkpointer, KeepLast, LeaseOptions, Run, RunOptions, Safetensors
from asyncckpt.errors import InvalidOption, NoUsableCheckpoint, RunLocked, SaveFailed, StepExists
from asyncckpt.storage import open_store, scheme_of
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.memory import MemoryBucket, MemoryStore
from asyncckpt.testing import FaultyOps

ADDRESS = "memory://tests-of-addresses"


@pytest.fixture
def bucket() -> MemoryBucket:
    return MemoryBucket("memory://a-bucket-of-its-own")


@pytest.fixture
def made(bucket: MemoryBucket) -> Iterator[Callable[..., Checkpointer]]:
    """Makes checkpointers of one run in a bucket, each as another process would; closes them."""
    all_of_them: list[Checkpointer] = []

    def make(**options: Any) -> Checkpointer:
        lease = LeaseOptions(beat_seconds=0.05, ttl_seconds=0.5)
        run = RunOptions(store=MemoryStore(bucket), lease=lease, **options.pop("run", {}))
        all_of_them.append(Checkpointer("anywhere", run=run, **options))
        return all_of_them[-1]

    yield make
    for one in all_of_them:
        one.close()


def _trained() -> dict[str, Any]:
    model = torch.nn.Linear(200, 100)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(200)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(
    "files", [Safetensors(), Safetensors(codec="planes"), Safetensors(codec="planes", delta=asyncckpt.Delta()), "zarr"]
)
def test_a_run_in_a_bucket_goes_on_where_it_was(files: Any, made: Callable[..., Checkpointer]) -> None:
    state = _trained()
    with made(files=files, keep=KeepLast(2)) as run:
        for step in range(1, 5):
            with torch.no_grad():
                state["model"].weight += 1
            run.save(step, state).result(30)
        expected = bits(state)
    found = _trained()
    with made(files=files) as run:
        assert run.resume(found) == 4
        assert bits(found) == expected
        assert [(entry.step, entry.damage) for entry in run.ls()] == [(3, None), (4, None)]
        assert run.verify() == []
        run.save(5, found).result(30)


def test_what_is_saved_is_read_back_where_that_is_asked_for(made: Callable[..., Checkpointer]) -> None:
    run = made(writer=asyncckpt.WriterOptions(read_back=True))
    assert run.save(1, _trained()).result(30).nbytes


def test_a_pin_in_a_bucket_holds(made: Callable[..., Checkpointer]) -> None:
    state = _trained()
    run = made(keep=KeepLast(1))
    run.save(1, state).result(30)
    run.pin(1)
    for step in (2, 3):
        run.save(step, state).result(30)
    run.wait()
    assert [(entry.step, entry.pinned) for entry in run.ls()] == [(1, True), (3, False)]
    run.unpin(1)
    run.save(4, state).result(30)
    run.wait()
    assert [entry.step for entry in run.ls()] == [4]


def test_a_taken_step_in_a_bucket_is_refused_and_stays(made: Callable[..., Checkpointer]) -> None:
    """Nothing there can take the place of another in one step, so nothing does."""
    state = _trained()
    with made() as run:
        for step in (1, 2):
            run.save(step, state).result(30)
    with made() as run:
        run.restore(state, step=1)
        assert isinstance(run.save(2, state).exception(30), StepExists)
        assert run.verify(2) == []
        run.save(3, state).result(30)
    with made(run={"overwrite": True}) as run:
        assert isinstance(run.save(1, state).exception(30), StepExists)
        assert [(entry.step, entry.damage) for entry in run.ls()] == [(1, None), (2, None), (3, None)]


def test_what_gives_way_under_another_name_goes_once_the_new_one_is_durable(made: Callable[..., Checkpointer]) -> None:
    state = _trained()
    name = {"name": "step-{step}-loss-{loss:.1f}"}
    with made(run=name) as run:
        for step in (1, 2):
            run.save(step, state, metrics={"loss": 1.0}).result(30)
    with made(run=name) as run:
        run.restore(state, step=1)
        run.save(2, state, metrics={"loss": 0.5}).result(30)
        run.wait()
        assert [entry.name for entry in run.ls()] == ["step-1-loss-1.0", "step-2-loss-0.5"]


def test_a_run_in_a_bucket_has_one_writer_at_a_time(made: Callable[..., Checkpointer]) -> None:
    state = _trained()
    with made() as first:
        first.save(1, state).result(30)
        with pytest.raises(RunLocked):
            made().save(2, state)
        with made(run={"takeover": True}) as second:
            second.save(2, state).result(30)
            assert first.save(3, state).exception(30) is not None, "published after it was cut off"
        assert [entry.step for entry in second.ls()] == [1, 2]


def _but_the_lease(bucket: MemoryBucket) -> set[str]:
    """All keys but those of the lease, which is renewed whenever its time has come."""
    return {key for key in bucket.listing("") if not key.startswith(".lease")}


def test_a_save_that_fails_leaves_nothing_in_the_bucket(
    bucket: MemoryBucket, made: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = made(), _trained()
    run.save(1, state).result(30)
    before = _but_the_lease(bucket)
    original = MemoryBucket.create

    def failing(self: MemoryBucket, key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            raise OSError("the bucket said 503")
        original(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryBucket, "create", failing)
        error = run.save(2, state).exception(30)
        assert isinstance(error, SaveFailed)
        assert "503" in str(error)
    run.wait()
    assert _but_the_lease(bucket) == before
    run.save(2, state).result(30)
    assert run.verify(2) == []


def test_damage_in_a_bucket_is_found_and_the_one_before_is_resumed_from(
    bucket: MemoryBucket, made: Callable[..., Checkpointer]
) -> None:
    state = _trained()
    with made() as run:
        for step in (1, 2):
            run.save(step, state).result(30)
    key = next(key for key in bucket.listing("step-00000002/") if key.endswith(".safetensors"))
    data = bytearray(bucket.read(key, 1 << 30, 0))
    data[-1] ^= 1
    bucket.replace(key, bytes(data))
    with made() as run:
        assert len(run.verify(2)) == 1
        with pytest.warns(RuntimeWarning, match="cannot be used"):
            assert run.resume(_trained()) == 1
    bucket.delete("step-00000001/manifest.json")
    with made() as run, pytest.warns(RuntimeWarning), pytest.raises(NoUsableCheckpoint):
        run.resume(_trained())


def test_an_address_is_the_same_run_wherever_it_is_opened() -> None:
    state = _trained()
    with Checkpointer(ADDRESS) as run:
        run.save(1, state).result(30)
        assert run.path == ADDRESS
    assert [entry.step for entry in Run(ADDRESS).ls()] == [1]
    assert Run(ADDRESS).ls()[0].path == f"{ADDRESS}/step-00000001"


def test_a_path_and_its_address_are_one_run(tmp_path: Path) -> None:
    with Checkpointer(f"file://{tmp_path}/run") as run:
        run.save(1, _trained()).result(30)
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [1]


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket/run", "HTTPS://host/run", Path("s3://bucket/run")])
def test_a_scheme_without_a_backend_is_refused_at_once(
    address: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a directory of that name, on the machine that is about to go away."""
    monkeypatch.chdir(tmp_path)
    for kind in (Checkpointer, Run):
        with pytest.raises(InvalidOption, match=r"no storage backend|as a string"):
            kind(address)
    assert os.listdir(tmp_path) == []


def test_a_path_that_only_looks_like_an_address_is_a_path() -> None:
    for path in ("/tmp/a://b", "./s3://x", "C:/runs", "runs:/today", "a/b"):
        assert scheme_of(path) == "file", path


def test_a_double_is_handed_over_as_the_store(tmp_path: Path) -> None:
    ops = FaultyOps()
    store = LocalStore(str(tmp_path / "run"), ops=ops)
    with Checkpointer(tmp_path / "run", run=RunOptions(store=store)) as run:
        model = torch.nn.Linear(3, 3)
        train_once = torch.optim.SGD(model.parameters())
        run.save(1, {"model": model, "optimizer": train_once}).result(30)
        ops.fail = ("fsync", 1, 5)
        assert isinstance(run.save(2, {"model": model, "optimizer": train_once}).exception(30), SaveFailed)
        ops.fail = None
    assert open_store(tmp_path / "run").names() == ["step-00000001"]
