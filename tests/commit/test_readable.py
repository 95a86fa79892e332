"""What no reader would take is refused when it is saved, by name, and nothing of it is published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.branches import saved, state, steps

from asyncckpt import (
    Checkpointer,
    InvalidOption,
    InvalidStep,
    Run,
    Safetensors,
    SaveFailed,
    UnsupportedValue,
    Zarr,
)
from asyncckpt.commit import transaction
from asyncckpt.formats import safetensors, zarr
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest import readable
from asyncckpt.types import LayoutOptions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize("step", [1 << 62, 1 << 64, 10**30])
def test_a_step_that_no_manifest_can_hold(step: int, path: Path) -> None:
    with Checkpointer(path) as run, pytest.raises(InvalidStep, match=r"below 2\*\*62"):
        run.save(step, state(1))
    with Checkpointer(path) as run:
        run.save((1 << 62) - 1, state(1)).result()
    assert steps(path) == [(1 << 62) - 1]


TOO_LARGE: dict[str, Callable[[], Any]] = {
    "safetensors": lambda: Safetensors(extent_bytes=(1 << 30) + 4096),
    "encoded": lambda: Safetensors(codec="zstd", extent_bytes=1 << 30),
    "zarr": lambda: Zarr(chunk_bytes=2 << 30),
    "layout": lambda: LayoutOptions(extent_bytes=2 << 30),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_extents_that_no_reader_takes(kind: str) -> None:
    with pytest.raises(InvalidOption, match="must be at most"):
        TOO_LARGE[kind]()
    Safetensors(extent_bytes=1 << 30)
    Zarr(codec="zstd", chunk_bytes=(1 << 30) - 4096)


def test_plain_values_that_no_reader_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "MAX_STATE_BYTES", 10_000)
    saved(path, 1)
    with Checkpointer(path) as run:
        error = run.save(2, state(2) | {"order": ["x" * 100] * 100}).exception(30)
        assert isinstance(error, UnsupportedValue)
        assert "in 'order'" in str(error)
        assert "step 2" in str(error)
        run.save(3, state(3)).result()
    assert steps(path) == [1, 3]


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_header_that_no_safetensors_reader_takes(codec: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 4096)
    many = {f"w{number}": torch.zeros(64 << 10, dtype=torch.uint8) for number in range(60)}
    model = torch.nn.Module()
    for name, tensor in many.items():
        model.register_buffer(name, tensor)
    run = Checkpointer(path, files=Safetensors(codec=codec, extent_bytes=4096))
    with run, pytest.raises(InvalidOption, match="smaller shard_bytes"):
        run.save(1, {"model": model})
    assert steps(path) == []


def test_an_index_that_no_zarr_reader_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr, "MAX_INDEX_BYTES", 100)
    with Checkpointer(path, files=Zarr(chunk_bytes=4096)) as run, pytest.raises(InvalidOption, match="shard_bytes"):
        run.save(1, {"w": torch.zeros(100_000)})


def test_a_manifest_that_is_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readable, "MAX_MANIFEST_BYTES", 500)
    with Checkpointer(path) as run:
        assert isinstance(error := run.save(1, state(1)).exception(30), SaveFailed)
    assert "step 1" in str(error)
    assert steps(path) == []


def test_a_manifest_that_its_own_parser_refuses_is_never_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(path, 1)
    original = manifests.encode

    def encode(manifest: Any, **options: Any) -> bytes:
        return original(dataclasses.replace(manifest, kind="other"), **options)

    with Checkpointer(path) as run:
        run.resume(state(0))
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "encode", encode)
            patch.setattr(readable, "encode", encode)
            assert isinstance(error := run.save(2, state(2)).exception(30), SaveFailed)
        assert "unknown kind" in str(error)
        run.save(3, state(3)).result()
    assert steps(path) == [1, 3]


@pytest.mark.parametrize("files", [Safetensors(), Safetensors(codec="zstd"), Zarr()], ids=["plain", "encoded", "zarr"])
def test_components_are_parsed_once_and_files_at_every_save(
    files: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = manifests.decode

    def decode(data: bytes, where: str) -> Any:
        found = original(data, where)
        seen.append(len(found.components))
        assert found.files
        return found

    monkeypatch.setattr(readable, "decode", decode)
    with Checkpointer(path, files=files) as run:
        for step in (1, 2, 3):
            run.save(step, state(step)).result()
        run.save(4, {"w": torch.zeros(900)}).result()
    assert seen == [2, 0, 0, 1]
    assert [Run(path).verify(step) for step in (1, 2, 3, 4)] == [[]] * 4
