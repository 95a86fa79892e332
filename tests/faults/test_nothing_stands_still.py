"""Whatever the options, sizes and speeds, and whatever changed since the save before: a save comes to its end. Memory,
buffers and threads are shared by everything that one save does, so that each could wait for the other."""

from __future__ import annotations

import errno
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_all_memory_came_back
from support.options import by_stage
from support.scenarios import count

from asyncckpt import AsyncCkptError, Checkpointer, Delta, KeepLast, Run, WriterOptions
from asyncckpt.testing import READING, InterceptedOps

_DEADLINE_SECONDS = 20.0
_SAVES = 6
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EINTR, errno.EMLINK, errno.EINVAL)


class _Moody(InterceptedOps):
    """Some calls take longer than others, and some fail, before they are done or after."""

    def __init__(self, rng: random.Random, seconds: float, errors: float = 0.0) -> None:
        self._rng = rng
        self._seconds = seconds
        self.errors = errors

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._seconds and name in ("pwrite", "preadv", "fsync", "fsync_directory") and self._rng.random() < 0.5:
            time.sleep(self._rng.random() * self._seconds)
        if name not in ("close", "close_read"):
            self._fail()
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in READING and name != "open":  # a descriptor that was never handed out cannot be closed
            self._fail()

    def _fail(self) -> None:
        if self._rng.random() < self.errors:
            raise OSError(self._rng.choice(_ERRORS), "at random")


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
        ),
        "stall_timeout_seconds": _DEADLINE_SECONDS,
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


def _trial(seed: int, path: Path, *, with_errors: bool) -> int:
    """One run of a few saves; how many failed."""
    rng = random.Random(seed)
    options, state = _options(rng), _state(rng)
    weights = {"w": state} if rng.random() < 0.5 else state
    expected: dict[int, dict[str, torch.Tensor]] = {}
    acknowledged = [0]
    failures = 0
    with Checkpointer(path, **by_stage(**options)) as run:
        run.prepare(weights)
        # copied behind training's back until the optimizer's next step; the rest, before ``save`` returns
        owned = [tensor for tensor in state.values() if rng.random() < 0.7] if rng.random() < 0.5 else []
        optimizer = torch.optim.SGD(owned, lr=0.1) if owned else None
        if optimizer is not None:
            run.watch(optimizer)
        ops = run._store.ops = _Moody(rng, rng.choice([0.0, 0.001, 0.004]))
        for step in range(1, _SAVES + 1):
            ops.errors = rng.choice([0.002, 0.01, 0.05]) if with_errors and step < _SAVES else 0.0
            expected[step] = {name: tensor.clone() for name, tensor in state.items()}
            try:
                run.wait(4 * _DEADLINE_SECONDS if ops.errors == 0.0 else 0.0)
            except AsyncCkptError:
                failures += 1  # of a save before, which nobody had asked
            try:
                pending = run.save(step, weights)
                pending.add_done_callback(lambda done, n=step: done.failed() or acknowledged.append(n))
                if step == _SAVES or rng.random() < 0.5:
                    error = pending.exception(2 * _DEADLINE_SECONDS)
                    assert error is None or (with_errors and step < _SAVES), f"step {step}: {error!r}"
                    failures += error is not None
            except AsyncCkptError:
                if not with_errors:
                    raise
                failures += 1
            if optimizer is not None:
                optimizer.step()
            _change(rng, state)
        assert run.wait(4 * _DEADLINE_SECONDS)
        assert_all_memory_came_back(run._arena)
    found = Run(path)
    infos = {info.step: info for info in found.ls()}
    assert infos[max(acknowledged)].damage is None
    for step, info in infos.items():
        if info.damage is None:
            assert found.verify(step) == []
            loaded = found.load_tensors(step)
            for name, tensor in expected[step].items():
                stored = loaded[f"w.{name}" if weights is not state else f"{name}.value"]
                assert torch.equal(stored.reshape(tensor.shape), tensor), f"step {step}: {name}"
    return failures


def _try(seeds: range, tmp_path: Path, *, with_errors: bool) -> int:
    failures = 0
    for seed in seeds:
        try:
            failures += _trial(seed, tmp_path / str(seed), with_errors=with_errors)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(tmp_path / str(seed))
    return failures


def test_a_save_comes_to_its_end_whatever_it_is_made_of(tmp_path: Path) -> None:
    assert _try(range(3), tmp_path, with_errors=False) == 0


def test_errors_at_random_cost_no_more_than_their_saves(tmp_path: Path) -> None:
    assert _try(range(5), tmp_path, with_errors=True) > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("with_errors", [False, True])
def test_saves_of_every_kind_come_to_their_end(with_errors: bool, tmp_path: Path) -> None:
    trials = count("RANDOM_RUNS", 300)
    failures = _try(range(1000, 1000 + trials), tmp_path, with_errors=with_errors)
    print(f"{trials} runs of {_SAVES} saves of random options came to their end; {failures} saves failed")
    assert bool(failures) == with_errors
