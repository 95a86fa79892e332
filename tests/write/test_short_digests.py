"""With a digest of 32 bits, states that differ may have equal ones: that must not decide what is taken over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from conftest import bits, unseen_by_crc32c
from support.options import by_stage

from asyncckpt import Checkpointer, Delta, Run, WriterOptions
from asyncckpt.codecs import digests

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "planes": {"codec": "planes"},
    "delta": {"codec": "planes", "delta": Delta(chain=3)},
    "zarr": {"format": "zarr"},
    "zarr planes": {"format": "zarr", "codec": "planes"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def _state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {"w": torch.randint(0, 9, (100_000,), generator=generator, dtype=torch.int32), "still": torch.arange(9000)}


def _zeros(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def _good(path: Path, step: int, expected: dict[str, Any]) -> None:
    assert Run(path).verify(step) == []
    Run(path).restore(found := _zeros(expected), step)
    assert bits(found) == bits(expected), f"step {step} holds what was saved before"


def _saves(run: Checkpointer, state: dict[str, Any], *changes: Callable[[], object]) -> list[int]:
    """The bytes written of each save: one, and one after each change."""
    written = []
    for step, change in enumerate((lambda: None, *changes), start=len(run.ls()) + 1):
        change()
        written.append(run.save(step, state).result().written_bytes)
        run.wait()
        _good(Path(run.path), step, state)
    return written


def test_the_change_is_one_that_crc32c_does_not_see() -> None:
    before = _state()["w"]
    unseen_by_crc32c(after := before.clone())
    assert not torch.equal(before, after)
    assert len({google_crc32c.value(tensor.numpy().tobytes()) for tensor in (before, after)}) == 1


@kinds
@pytest.mark.parametrize("extent_bytes", [32 << 10, 8 << 20])
def test_a_change_that_the_digest_does_not_show_is_saved(kind: str, extent_bytes: int, tmp_path: Path) -> None:
    state = _state()
    unseen = functools.partial(unseen_by_crc32c, state["w"])
    with Checkpointer(tmp_path / "run", **by_stage(digest="crc32c", extent_bytes=extent_bytes, **KINDS[kind])) as run:
        _saves(run, state, unseen, unseen)


@kinds
def test_nor_is_it_copied_from_where_another_part_of_the_file_changed(kind: str, tmp_path: Path) -> None:
    state = _state()

    def changes() -> None:
        unseen_by_crc32c(state["w"])
        state["w"][-1] += 1

    with Checkpointer(tmp_path / "run", **by_stage(digest="crc32c", extent_bytes=32 << 10, **KINDS[kind])) as run:
        _saves(run, state, changes, changes)


@kinds
def test_what_has_not_changed_is_taken_over_all_the_same(kind: str, tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(digest="crc32c", **KINDS[kind])) as run:
        first, *later = _saves(run, state, lambda: None, lambda: state["w"].add_(1), lambda: None)
        assert later[0] < first / 4
        assert later[2] < first / 4


@kinds
def test_what_another_process_saved_is_written_anew_once(kind: str, tmp_path: Path) -> None:
    """Only the process that wrote it knows the second digests."""
    state = _state()
    with Checkpointer(tmp_path / "run", **by_stage(digest="crc32c", **KINDS[kind])) as run:
        (first,) = _saves(run, state)
    unseen_by_crc32c(state["w"])
    with Checkpointer(tmp_path / "run", **by_stage(digest="crc32c", **KINDS[kind])) as run:
        run.resume(_zeros(state))
        anew, linked = _saves(run, state, lambda: None)
        assert anew > first / 2
        assert linked < first / 4


@pytest.mark.parametrize("name", ["xxh3-128", "blake3", "sha256"])
def test_a_long_digest_decides_by_itself(name: str, tmp_path: Path) -> None:
    assert digests.second(name) is None
    state = _state()
    for _ in range(2):  # in this process and, as it seems, in another
        with Checkpointer(tmp_path / "run", writer=WriterOptions(digest=name)) as run:
            written = _saves(run, state, lambda: None)
            assert written[1] < 64 << 10
    assert written[0] < 64 << 10


def test_nor_is_a_change_missed_that_is_copied_while_training_goes_on(tmp_path: Path) -> None:
    """Then the digest was taken by the thread that copied."""
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run", writer=WriterOptions(digest="crc32c")) as run:
        run.watch(optimizer)
        run.save(1, {"model": model}).result()
        run.wait()
        with run.guard():
            unseen_by_crc32c(model.weight.data)
        run.save(2, {"model": model}).result()
        found = run.load_tensors(2)["model.weight"]
        assert torch.equal(found.view(torch.int32), model.weight.view(torch.int32))
