"""Linked files are read back in turn: damage to one that never changes does not live on from save to save."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.options import by_stage
from support.taking_over import assert_holds, data_files, kinds, save_and_wait, shared_files

from asyncckpt import Checkpointer, Safetensors
from asyncckpt.codecs import Planes
from asyncckpt.formats.options import Delta
from asyncckpt.storage.reader import LocalReader
from asyncckpt.write import link_checks
from asyncckpt.write.link_checks import LinkChecks

EXTENT = 256 << 10


def frozen(extents: int = 4) -> dict[str, Any]:
    base = torch.nn.Linear(1, extents * EXTENT // 4, bias=False).requires_grad_(False)
    torch.nn.init.normal_(base.weight, generator=torch.Generator().manual_seed(1))
    return {"base": base, "step": torch.zeros(3)}


def flip(path: str | Path, name: str, at: float = 0.6) -> Path:
    """Flip one bit of a checkpoint's only file of that component, in every checkpoint that shares the file."""
    file = next(file for called, file in data_files(path).items() if called.startswith(name))
    with file.open("r+b") as opened:
        opened.seek(int(file.stat().st_size * at))
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 4]))
    return file


@kinds
@pytest.mark.parametrize("at", [0.3, 0.97])
def test_the_next_save_finds_a_flipped_bit_and_writes_the_file_anew(
    shard_format: str, codec: str, at: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = frozen()
    options = by_stage(format=shard_format, codec=codec, extent_bytes=EXTENT)
    with Checkpointer(tmp_path / "run", **options) as run:
        save_and_wait(run, 1, state)
        second = save_and_wait(run, 2, state)
        assert shared_files(run, f"{run.path}/step-00000001", second.path)
        damaged = flip(second.path, "base", at)
        with caplog.at_level(logging.ERROR, "asyncckpt"):
            third = save_and_wait(run, 3, state)
        assert str(damaged) in caplog.text
        assert_bases(run, 3, state)
        assert run.verify(2), "the damage is not covered up"
        fourth = save_and_wait(run, 4, state)
        assert shared_files(run, third.path, fourth.path), "nothing is linked any more"
        assert_bases(run, 4, state)


def assert_bases(run: Checkpointer, step: int, state: dict[str, Any]) -> None:
    assert run.verify(step) == []
    assert torch.equal(run.load_tensors(step, ["base"])["base.weight"], state["base"].weight)


def test_a_delta_whose_base_is_damaged_is_found(tmp_path: Path) -> None:
    state = {"w": torch.randn(EXTENT // 2, generator=torch.Generator().manual_seed(2))}
    files = Safetensors(codec=Planes(), delta=Delta(), extent_bytes=EXTENT)
    with Checkpointer(tmp_path / "run", files=files) as run:
        save_and_wait(run, 1, state)
        state["w"][:9] += 1
        second = save_and_wait(run, 2, state)
        base = next(file for name, file in data_files(second.path).items() if name.startswith("base/"))
        flip(base.parent, base.name)
        save_and_wait(run, 3, state)
        assert_holds(tmp_path / "run", 3, state)


def test_a_checkpoint_that_was_found_damaged_is_told_and_not_built_on(tmp_path: Path) -> None:
    state = frozen() | {"other": torch.randn(EXTENT)}
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=EXTENT)) as run:
        first = save_and_wait(run, 1, state)
        flip(first.path, "base")
        save_and_wait(run, 2, state)
        assert "step-00000001" in run._quarantine
        assert "step-00000002" not in run._quarantine


def read_back(run: Checkpointer, step: int, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Save, and return the offsets in the frozen file that were read meanwhile."""
    found: set[int] = set()
    lock, original = threading.Lock(), LocalReader.read_into

    def read_into(self: LocalReader, file: str, buffer: Any, nbytes: int, offset: int) -> int:
        with lock:
            if file.startswith("base"):
                found.add(offset)
        return original(self, file, buffer, nbytes, offset)

    with monkeypatch.context() as patch:
        patch.setattr(LocalReader, "read_into", read_into)
        save_and_wait(run, step, state)
    return found


def test_each_save_reads_back_its_share_and_all_are_reached_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_checks, "_LEAST_BYTES", 3 * EXTENT)
    state = frozen(7)  # and a header: eight extents; the other file has one
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=EXTENT)) as run:
        save_and_wait(run, 1, state)
        rounds = [read_back(run, step, state, monkeypatch) for step in range(2, 8)]
    assert all(len(offsets) <= 3 for offsets in rounds)
    for begin in (0, 3):
        assert set.union(*rounds[begin : begin + 3]) == {EXTENT * number for number in range(8)}
        assert sum(map(len, rounds[begin : begin + 3])) == 8, "some were read twice before all had their turn"


def test_a_save_reads_back_as_much_as_it_writes_within_bounds() -> None:
    checks = LinkChecks()
    little, some, much = checks.begin(0), checks.begin(100 << 20), checks.begin(3 << 30)
    assert sum(little.take("a", number, 1 << 20) for number in range(2000)) == 64
    assert sum(some.take("b", number, 1 << 20) for number in range(2000)) == 100
    assert sum(much.take("c", number, 1 << 20) for number in range(2000)) == 1024


def test_an_extent_that_is_larger_than_all_that_is_read_back_has_its_turn_too() -> None:
    one = LinkChecks().begin(0)
    assert [one.take("a", number, 1 << 30) for number in range(3)] == [True, False, False]


def test_a_round_ends_with_the_save_that_reached_all() -> None:
    checks = LinkChecks()
    first = checks.begin(0)
    assert first.take("a", 0, 64 << 20)
    assert not first.take("a", 1, 64 << 20)
    first.end()
    second = checks.begin(0)
    assert [second.take("a", number, 32 << 20) for number in (0, 1, 2)] == [False, True, True]
    second.end()
    assert checks.begin(0).take("a", 0, 32 << 20), "the next round did not begin"


def test_a_turn_that_was_given_back_comes_again() -> None:
    checks = LinkChecks()
    first = checks.begin(0)
    assert first.take("a", 0, 1 << 20)
    first.give_back("a", 0, 1 << 20)
    assert first.take("a", 1, 64 << 20), "its bytes were not given back"
    first.end()
    assert checks.begin(0).take("a", 0, 1 << 20)


def test_where_memory_is_waited_for_one_extent_a_save_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = frozen(7)
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=EXTENT)) as run:
        save_and_wait(run, 1, state)
        monkeypatch.setattr(run._arena, "waiting", 1)
        rounds = [read_back(run, step, state, monkeypatch) for step in range(2, 11)]
        monkeypatch.setattr(run._arena, "waiting", 0)
    assert sorted(len(offsets) for offsets in rounds) == [0] + [1] * 8  # once it was the turn of the other file
    assert set.union(*rounds) == {EXTENT * number for number in range(8)}


def test_many_tiny_files_do_not_cost_a_read_each() -> None:
    one = LinkChecks().begin(0)
    assert sum(one.take(f"file-{number}", 0, 10) for number in range(10_000)) == 256


def test_changed_files_are_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = frozen()
    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=EXTENT)) as run:
        save_and_wait(run, 1, state)
        torch.nn.init.zeros_(state["base"].weight)
        assert read_back(run, 2, state, monkeypatch) == set()
