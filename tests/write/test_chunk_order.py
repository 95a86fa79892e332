"""Chunks that lie in another order than the layout's are found, and taken over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.options import by_stage
from support.taking_over import SMALL_BYTES, assert_holds, save_and_wait, shared_files

from asyncckpt import Checkpointer, Run
from asyncckpt.codecs.codecs import Planes


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
        path = save_and_wait(run, 1, state).path
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
    assert_holds(path, 1, state)
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
        second = save_and_wait(run, 2, state)
        shared = shared_files(run, str(path / "step-00000001"), second.path)
        assert bool(shared) == (changed is None)
        third = save_and_wait(run, 3, state)
        assert third.written_bytes < SMALL_BYTES
    assert_holds(path, 2, state)
    assert_holds(path, 3, state)
