"""Every bit of a zarr checkpoint counts: one that flips, in data, index or metadata, is seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt import CheckpointDamaged, Checkpointer, Run, VersionUnsupported, WriterOptions, Zarr

CODECS = ["none", "planes"]


def _state() -> dict[str, Any]:
    """An array of several shards with several chunks, one that ``planes`` shrinks, one of a single chunk, a scalar."""
    random = np.random.default_rng(1)
    return {
        "sharded": torch.from_numpy(random.integers(0, 9, 4500, dtype=np.int16)).reshape(9, 500),
        "one": torch.arange(33, dtype=torch.float32).to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "plain": {"lr": 0.1},
    }


def _large() -> dict[str, Any]:
    """Chunks large enough for a codec to shrink them."""
    return {"w": (torch.arange(12_000) % 7).to(torch.float32).reshape(2, 6000)}


def _save(path: Path, state: dict[str, Any], codec: str, extent_bytes: int) -> Path:
    with Checkpointer(
        path,
        files=Zarr(codec=codec, chunk_bytes=extent_bytes, shard_bytes=2 * extent_bytes),
        writer=WriterOptions(reuse_unchanged=False),
    ) as run:
        return Path(run.save(1, state).result().path)


def _files(path: Path) -> list[Path]:
    """Every file once, whatever its names: equal metadata is one file."""
    found = {file.stat().st_ino: file for file in sorted(path.rglob("*")) if file.is_file()}
    return list(found.values())


def _flip(path: Path, positions: dict[Path, range | list[int]], *, restoring: bool) -> int:
    """Flip these bits of these files one at a time; each must be found. Returns the flips."""
    run = Run(path.parent, direct=False)
    flips = 0
    for file, chosen in positions.items():
        original = file.read_bytes()
        with file.open("r+b", buffering=0) as handle:
            for position in chosen:
                index, bit = divmod(position, 8)
                os.pwrite(handle.fileno(), bytes([original[index] ^ (1 << bit)]), index)
                assert run.verify(1), f"{file.name}: bit {position} flipped unseen by verify"
                if restoring:
                    with pytest.raises((CheckpointDamaged, VersionUnsupported)):
                        run.load_tensors(1)
                os.pwrite(handle.fileno(), original[index : index + 1], index)
                flips += 1
    assert run.verify(1) == []
    return flips


@pytest.mark.parametrize("codec", CODECS)
def test_sampled_bit_flips_in_every_file_are_all_detected(codec: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "run", _state(), codec, 4096)
    files = _files(path)
    assert {file.name for file in files} >= {"zarr.json", "manifest.json", "state.json", "c.0.0", "c.0", "c"}
    random = np.random.default_rng(2)
    positions = {
        file: sorted({0, file.stat().st_size * 8 - 1, *map(int, random.integers(0, file.stat().st_size * 8, 28))})
        for file in files
    }
    assert _flip(path, positions, restoring=True) > 250


def test_sampled_bit_flips_in_compressed_chunks_are_all_detected(tmp_path: Path) -> None:
    path = _save(tmp_path / "run", _large(), "planes", 24_576)
    shards = [file for file in _files(path) if file.name.startswith("c.")]
    assert sum(file.stat().st_size for file in shards) < 40_000, "nothing was compressed"
    positions = {file: range(0, file.stat().st_size * 8, 503) for file in shards}
    assert _flip(path, positions, restoring=True) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("codec", CODECS)
def test_every_single_bit_flip_in_every_file_is_detected(codec: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "run", _state(), codec, 4096)
    positions: dict[Path, range | list[int]] = {file: range(file.stat().st_size * 8) for file in _files(path)}
    assert _flip(path, positions, restoring=False) == sum(file.stat().st_size for file in positions) * 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_single_bit_flip_in_compressed_chunks_is_detected(tmp_path: Path) -> None:
    path = _save(tmp_path / "run", _large(), "planes", 24_576)
    positions: dict[Path, range | list[int]] = {
        file: range(file.stat().st_size * 8) for file in _files(path) if file.name.startswith("c.")
    }
    assert _flip(path, positions, restoring=False) == sum(file.stat().st_size for file in positions) * 8
