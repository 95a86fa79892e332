"""Whatever the options, sizes and speeds, and whatever changed since the save before: a save comes to its end. Memory,
buffers and threads are shared by everything that one save does, so that each could wait for the other."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import count

from asyncckpt import Checkpointer, Delta, KeepLast, Run, WriterOptions
from asyncckpt.protocols import Buffer
from asyncckpt.storage.posix import PosixOps

_DEADLINE_SECONDS = 20.0


class _Uneven(PosixOps):
    """Some calls take longer than others."""

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self._rng = rng
        self._seconds = seconds

    def _dawdle(self) -> None:
        if self._seconds and self._rng.random() < 0.5:
            time.sleep(self._rng.random() * self._seconds)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._dawdle()
        return super().pwrite(fd, data, offset)

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        self._dawdle()
        return super().preadv(fd, buffer, offset)

    def fsync(self, fd: int) -> None:
        self._dawdle()
        super().fsync(fd)


def _options(rng: random.Random) -> dict[str, Any]:
    codec = rng.choice(["none", "planes", "auto", "zstd", "lz4", "blosc"])
    incremental = rng.random() < 0.8
    written_as = rng.choice(["safetensors", "zarr"])
    can_differ = written_as == "safetensors" and codec != "none" and incremental
    return {
        "format": written_as,
        "codec": codec,
        "incremental": incremental,
        "delta": Delta(chain=rng.randint(1, 3)) if can_differ and rng.random() < 0.7 else None,
        "extent_bytes": rng.choice([4096, 20 << 10, 64 << 10, 8 << 20]),
        "shard_bytes": rng.choice([100_000, 1 << 30]),
        "staging_bytes": rng.choice([1 << 20, 3 << 20, None]),
        "max_in_flight": rng.randint(1, 3),
        "keep": rng.choice([(), KeepLast(1), KeepLast(2)]),
        "writer": WriterOptions(
            threads=rng.randint(1, 3),
            durable_timeout_seconds=_DEADLINE_SECONDS,
            stall_timeout_seconds=_DEADLINE_SECONDS,
        ),
    }


def _state(rng: random.Random) -> dict[str, torch.Tensor]:
    """A few large tensors and, at times, many small ones."""
    sizes = [rng.choice([300_000, 70_000, 900_000]) for _ in range(rng.randint(1, 3))]
    sizes += [rng.randint(0, 3_000) for _ in range(rng.choice([0, 3, 40]))]
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    return {f"t{number}": torch.randn(size).to(rng.choice(dtypes)) for number, size in enumerate(sizes)}


def _change(rng: random.Random, state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        how = rng.random()
        if tensor.numel() and how < 0.6:
            part = slice(None) if how < 0.3 else slice(first := rng.randrange(tensor.numel()), first + 1)
            tensor[part] += 1


def _trial(seed: int, path: Path) -> None:
    rng = random.Random(seed)
    options, state = _options(rng), _state(rng)
    weights = {"w": state} if rng.random() < 0.5 else state
    expected: dict[int, dict[str, torch.Tensor]] = {}
    with Checkpointer(path, **options) as run:
        run._store.ops = _Uneven(rng, rng.choice([0.0, 0.001, 0.004]))
        for step in range(1, 6):
            pending = run.save(step, weights)
            expected[step] = {name: tensor.clone() for name, tensor in state.items()}
            if rng.random() < 0.5:
                pending.result(2 * _DEADLINE_SECONDS)
            _change(rng, state)
        assert run.wait(4 * _DEADLINE_SECONDS)
    found = Run(path)
    for info in found.ls():
        assert found.verify(info.step) == []
        loaded = found.load_tensors(info.step)
        for name, tensor in expected[info.step].items():
            stored = loaded[f"w.{name}" if weights is not state else f"{name}.value"]
            assert torch.equal(stored.reshape(tensor.shape), tensor), (seed, info.step, name)


def _try(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        try:
            _trial(seed, tmp_path / str(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(tmp_path / str(seed))


def test_a_save_comes_to_its_end_whatever_it_is_made_of(tmp_path: Path) -> None:
    _try(range(8), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_saves_of_every_kind_come_to_their_end(tmp_path: Path) -> None:
    trials = count("LIVENESS_TRIALS", 300)
    _try(range(1000, 1000 + trials), tmp_path)
    print(f"{trials} runs of 5 saves each, of random options, all of them came to their end")
