"""What did not change is taken over from the checkpoint before, and every checkpoint stays complete by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Tiny, bits, train
from support.options import by_stage
from support.taking_over import (
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

from asyncckpt import Checkpointer, KeepLast, Run, WriterOptions
from asyncckpt.codecs import codecs


@kinds
def test_unchanged_files_are_links_and_changed_ones_are_not(shard_format: str, codec: str, tmp_path: Path) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = save_and_wait(run, 1, state)
        before = bits(state)
        state["big"][7, 7] += 1
        second = save_and_wait(run, 2, state)
        shared = {component_of(name) for name in shared_files(run, first.path, second.path)}
        assert shared == {"same", "tiny"}
        changed = sum(f.stat().st_size for n, f in data_files(second.path).items() if component_of(n) == "big")
        assert changed <= second.written_bytes <= changed + SMALL_BYTES
        third = save_and_wait(run, 3, state)
        assert shared_files(run, second.path, third.path) == data_files(second.path).keys()
        assert third.written_bytes < SMALL_BYTES < third.nbytes
        assert first.written_bytes == first.nbytes
    assert_holds(tmp_path / "run", 3, state)
    assert_holds(tmp_path / "run", 2, state)
    live = {name: torch.zeros_like(value) for name, value in some_state().items() if isinstance(value, torch.Tensor)}
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
        first = save_and_wait(run, 1, state)
        with run.open(1) as checkpoint:
            tensors = checkpoint.manifest.components["model"].tensors
        frozen = {file for name, tensor in tensors.items() if name.startswith("frozen.") for file in tensor.files}
        live = {file for name, tensor in tensors.items() if not name.startswith("frozen.") for file in tensor.files}
        assert frozen
        assert live
        assert not frozen & live
        train(model, optimizer)
        second = save_and_wait(run, 2, state)
        assert shared_files(run, first.path, second.path) >= frozen
        other = Tiny(160)
        run.restore({"model": other}, 2)
        assert bits(other) == bits(model)
        # training goes on with them: the layout changes, and nothing is mixed up
        model.frozen.requires_grad_(True)
        save_and_wait(run, 3, state)
        for step in (1, 2, 3):
            assert run.verify(step) == []
        run.restore({"model": other}, 3)
        assert bits(other) == bits(model)


@kinds
def test_a_checkpoint_does_not_need_the_one_it_was_linked_from(shard_format: str, codec: str, tmp_path: Path) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = save_and_wait(run, 1, state)
        state["tiny"] += 1
        save_and_wait(run, 2, state)
    shutil.rmtree(first.path)
    assert_holds(tmp_path / "run", 2, state)
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec, keep=KeepLast(1))) as run:
        for step in (3, 4, 5):
            state["tiny"] += 1
            report = save_and_wait(run, step, state)
            assert report.written_bytes < report.nbytes / 2
            assert [entry.step for entry in run.ls()] == [step]
            assert_holds(tmp_path / "run", step, state)


@kinds
def test_the_first_save_after_a_resume_takes_over_what_is_on_disk(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        first = save_and_wait(run, 1, state)
    live = {name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else {} for name, value in state.items()}
    with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
        assert run.resume(live) == 1
        live["same"][5] = 0
        second = save_and_wait(run, 2, live)
        assert {component_of(name) for name in shared_files(run, first.path, second.path)} == {"big", "tiny"}
    assert_holds(tmp_path / "run", 2, live)


def test_weights_only_checkpoints_are_compared_with_their_like(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    state = {"model": model, "count": torch.zeros(3)}
    with Checkpointer(tmp_path / "run") as run:
        save_and_wait(run, 1, state)
        weights = save_and_wait(run, 2, state, weights_only=True)
        save_and_wait(run, 3, state)
        again = save_and_wait(run, 4, state, weights_only=True)
        assert shared_files(run, weights.path, again.path)
        for entry in run.ls():
            assert run.verify_entry(entry) == []


def test_incremental_false_writes_everything(tmp_path: Path) -> None:
    state = some_state()
    with Checkpointer(tmp_path / "run", writer=WriterOptions(reuse_unchanged=False)) as run:
        first = save_and_wait(run, 1, state)
        second = save_and_wait(run, 2, state)
        assert second.written_bytes == second.nbytes
        assert all(file.stat().st_nlink == 1 for file in data_files(second.path).values())
        assert not any(file.samefile(data_files(second.path)[name]) for name, file in data_files(first.path).items())
    assert_holds(tmp_path / "run", 2, state)


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
        save_and_wait(run, 1, one)
        save_and_wait(run, 2, other)
    assert_holds(tmp_path / "run", 1, one)
    assert_holds(tmp_path / "run", 2, other)


@pytest.mark.parametrize("shard_format", ["safetensors", "zarr"])
def test_another_codec_or_format_takes_nothing_over_that_it_could_not_read(shard_format: str, tmp_path: Path) -> None:
    state = some_state()
    step = 0
    for codec in ("none", "planes", "zstd", codecs.Zstd(level=3), "lz4", "none", "planes"):
        step += 1
        with Checkpointer(tmp_path / "run", **by_stage(format=shard_format, codec=codec)) as run:
            save_and_wait(run, step, state)
        assert_holds(tmp_path / "run", step, state)
    for other in ("zarr", "safetensors"):
        step += 1
        with Checkpointer(tmp_path / "run", **by_stage(format=other, codec="planes")) as run:
            save_and_wait(run, step, state)
        assert_holds(tmp_path / "run", step, state)


@kinds
def test_a_long_run_of_small_changes_keeps_every_checkpoint_as_it_was(
    shard_format: str, codec: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(6)
    state = some_state() | one_long_tensor()
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
