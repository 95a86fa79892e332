"""Damage of any kind, anywhere in a checkpoint, is seen by ``verify`` and stops ``restore``."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits

from asyncckpt import (
    AsyncCkptError,
    CheckpointDamaged,
    Checkpointer,
    NoUsableCheckpoint,
    Run,
    VersionUnsupported,
    WriterOptions,
)
from asyncckpt.manifest import json as manifests


def _small(path: Path, steps: tuple[int, ...] = (1,)) -> tuple[dict[str, Any], list[Path]]:
    state: dict[str, Any] = {"w": torch.arange(40, dtype=torch.float32), "n": torch.tensor(3), "plain": {"lr": 0.1}}
    paths = []
    with Checkpointer(path, writer=WriterOptions(reuse_unchanged=False)) as run:
        for step in steps:
            state["w"] += step
            paths.append(Path(run.save(step, state).result().path))
    return state, paths


def _flip_every_bit(path: Path, stride: int = 1) -> int:
    """Flip each bit of each file in turn; every flip must be found by both ways of looking. Returns the flips."""
    run = Run(path.parent, direct=False)
    flips = 0
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        with file.open("r+b", buffering=0) as handle:
            for position in range(0, len(original) * 8, stride):
                index, bit = divmod(position, 8)
                os.pwrite(handle.fileno(), bytes([original[index] ^ (1 << bit)]), index)
                damage = run.verify(1)
                assert damage, f"{file.name}: bit {position} flipped unseen by verify"
                live = {"w": torch.zeros(40), "n": torch.tensor(0), "plain": {}}
                with pytest.raises((CheckpointDamaged, VersionUnsupported)):
                    run.restore(live, 1)
                os.pwrite(handle.fileno(), original[index : index + 1], index)
                flips += 1
    assert run.verify(1) == []
    return flips


def test_sampled_bit_flips_in_every_file_are_all_detected(tmp_path: Path) -> None:
    _, [path] = _small(tmp_path / "run")
    assert _flip_every_bit(path, stride=97) > 700


def test_a_checkpoint_deleted_while_it_is_listed_is_never_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small(tmp_path / "run", (1, 2))
    load = manifests.load

    def vanish(reader: Any, **options: Any) -> Any:
        found = load(reader, **options)
        if found.step == 1:
            shutil.rmtree(reader.path)
        return found

    monkeypatch.setattr(manifests, "load", vanish)
    assert [(entry.step, entry.damage) for entry in Run(tmp_path / "run").ls()] == [(2, None)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_single_bit_flip_in_every_file_is_detected(tmp_path: Path) -> None:
    _, [path] = _small(tmp_path / "run")
    total = sum(file.stat().st_size for file in path.iterdir()) * 8
    assert _flip_every_bit(path) == total


def _damages() -> dict[str, Any]:
    def shard(path: Path) -> Path:
        return path / "w-00001-of-00001.safetensors"

    def hole(path: Path) -> None:  # the right size, and nothing in it
        size = shard(path).stat().st_size
        shard(path).write_bytes(b"")
        os.truncate(shard(path), size)

    def swap(path: Path) -> None:
        one, other = shard(path), path / "n-00001-of-00001.safetensors"
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)

    return {
        "truncated": lambda p: os.truncate(shard(p), shard(p).stat().st_size - 1),
        "grown": lambda p: shard(p).write_bytes(shard(p).read_bytes() + b"\0"),
        "missing shard": lambda p: shard(p).unlink(),
        "hole": hole,
        "swapped shards": swap,
        "stale shard": lambda p: shutil.copy(p.parent / "step-00000001" / shard(p).name, shard(p)),
        "symlink": lambda p: (shard(p).rename(p.parent / "moved"), shard(p).symlink_to(p.parent / "moved")),
        "fifo": lambda p: (shard(p).unlink(), os.mkfifo(shard(p))),
        "directory for a file": lambda p: (shard(p).unlink(), shard(p).mkdir()),
        "missing manifest": lambda p: (p / "manifest.json").unlink(),
        "empty manifest": lambda p: (p / "manifest.json").write_bytes(b""),
        "half a manifest": lambda p: os.truncate(p / "manifest.json", 300),
        "manifest of another step": lambda p: shutil.copy(
            p.parent / "step-00000001/manifest.json", p / "manifest.json"
        ),
        "missing state.json": lambda p: (p / "state.json").unlink(),
        "manifest is a link": lambda p: (
            (p / "manifest.json").rename(p.parent / "m"),
            (p / "manifest.json").symlink_to(p.parent / "m"),
        ),
    }


@pytest.mark.parametrize("damage", _damages().values(), ids=_damages())
def test_a_damaged_newest_checkpoint_falls_back_loudly_and_is_kept(damage: Any, tmp_path: Path) -> None:
    _small(tmp_path / "run", (1, 2))
    newest = tmp_path / "run" / "step-00000002"
    before = Run(tmp_path / "run").load_tensors(1)
    damage(newest)
    with Checkpointer(tmp_path / "run") as run:
        assert [entry.step for entry in run.ls()] == [1, 2]
        live = {"w": torch.zeros(40), "n": torch.tensor(0), "plain": {}}
        with pytest.warns(RuntimeWarning, match="step-00000002 cannot be used"):
            assert run.resume(live) == 1
        assert bits(live["w"]) == bits(before["w.value"])
        assert newest.exists(), "evidence is never deleted"
        # the step can be saved again, and what was there is set aside
        run.save(2, live).result()
        assert run.verify(2) == []
    assert list((tmp_path / "run").glob(".damaged-step~00000002-*"))


def test_where_nothing_is_usable_training_never_starts_from_scratch(tmp_path: Path) -> None:
    _small(tmp_path / "run", (1, 2))
    for step in (1, 2):
        os.truncate(tmp_path / f"run/step-0000000{step}/w-00001-of-00001.safetensors", 10)
    with Checkpointer(tmp_path / "run") as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NoUsableCheckpoint, match=r"2 checkpoints .* nothing was deleted"):
            run.resume({"w": torch.zeros(40)})


def test_weights_only_checkpoints_alone_are_no_reason_to_start_over(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model}, weights_only=True).result()
        with pytest.raises(NoUsableCheckpoint, match="weights-only"):
            run.resume({"model": model})


def test_a_newer_format_is_named_and_never_taken_for_damage(tmp_path: Path) -> None:
    _, [path] = _small(tmp_path / "run")
    data = (path / "manifest.json").read_bytes()
    body = data[: data.rfind(b',"manifest_digest"')].replace(b'"format_version":1', b'"format_version":7')
    (path / "manifest.json").write_bytes(manifests.seal(body))
    with Checkpointer(tmp_path / "run") as run:
        with pytest.raises(VersionUnsupported, match=r"version 7.*Upgrade"):
            run.resume({"w": torch.zeros(40)})
        with pytest.raises(AsyncCkptError):
            run.verify(1)


def test_damage_is_found_on_the_device_not_in_the_page_cache(tmp_path: Path) -> None:
    """Bytes are read past the cache where the file system can, so a flip under a warm cache is seen."""
    _, [path] = _small(tmp_path / "run")
    file = path / "w-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    try:
        fd = os.open(file, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    os.close(fd)
    file.write_bytes(data)
    assert Run(tmp_path / "run").verify(1)
