"""Units: whatever the budget and the cuts, a save holds every byte once, in files that are the same as ever."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.drawn_states import drawn_state
from support.examples import examples
from support.options import by_stage

from asyncckpt import Checkpointer, Run
from asyncckpt.events import Event, ExtentStaged, ExtentWritten
from asyncckpt.memory.arena import Arena
from asyncckpt.stage import copy as copying
from asyncckpt.stage.units import Unit, Units, follows, unit_bytes
from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import Extent, Segment

MIB = 1 << 20


def _extent(offset: int, nbytes: int, *, shard: int = 0, block_offset: int = 0, item_bytes: int = 0) -> Extent:
    return Extent(shard, offset, nbytes, b"", (), item_bytes, block_offset=block_offset)


def _files(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.glob("*.safetensors")}


@examples(40)
@given(data=st.data())
def test_files_do_not_depend_on_the_budget(data: st.DataObject) -> None:
    """The digests in the manifest are those of the extents, whatever was written at once."""
    state = {"tensors": drawn_state(data)}
    extent_bytes = data.draw(st.sampled_from([4 << 10, 64 << 10, 256 << 10]))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, budget in enumerate((MIB, data.draw(st.integers(MIB, 16 * MIB)), 64 * MIB)):
            path = Path(folder) / str(number)
            with Checkpointer(path, **by_stage(extent_bytes=extent_bytes, staging_bytes=budget)) as run:
                report = run.save(1, state).result(60)
            Run(path).verify(1)
            loaded = Run(path).load_tensors(1)
            for name, tensor in state["tensors"].items():
                assert torch.equal(loaded[f"tensors.{name}"], tensor.resolve_conj().resolve_neg())
            files = json.loads((Path(report.path) / "manifest.json").read_text())["files"]
            found.append((_files(Path(report.path)), [one for one in files if one["name"].endswith(".safetensors")]))
    assert found[0] == found[1] == found[2]


def _events(path: Path, state: Any, **options: Any) -> list[Event]:
    events: list[Event] = []
    with Checkpointer(path, on_event=events.append, **by_stage(**options)) as run:
        run.prepare(state)
        run._arena.wait_prepared(20)
        run.save(1, state).result(60)
    return events


def test_extents_go_to_the_disk_together_as_far_as_the_budget_has_room_for_eight_units(tmp_path: Path) -> None:
    state = {"w": torch.arange(4 * MIB, dtype=torch.int32)}
    for number, (budget, most) in enumerate([(16 * MIB, 2 * MIB), (4 * MIB, 512 << 10), (MIB, 128 << 10)]):
        options = {"extent_bytes": 64 << 10, "staging_bytes": budget}
        events = _events(tmp_path / str(number), state, **options)
        for kind in (ExtentStaged, ExtentWritten):
            sizes = [event.nbytes for event in events if isinstance(event, kind)]
            assert max(sizes) == most
            assert sum(sizes) > 16 * MIB, "bytes are missing"
    assert unit_bytes(1 << 40) == 64 * MIB


@pytest.mark.parametrize("changed", [(0,), (5,), (63,), (3, 4, 40)])
def test_of_a_unit_that_matched_in_part_every_byte_is_written(changed: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.arange(MIB, dtype=torch.int32)
    with Checkpointer(tmp_path / "run", **by_stage(extent_bytes=64 << 10, staging_bytes=8 * MIB)) as run:
        run.save(1, {"w": tensor}).result(60)
        for extent in changed:
            tensor[extent * (16 << 10) + 100] = -1
        run.save(2, {"w": tensor}).result(60)
        same = run.save(3, {"w": tensor}).result(60)
    for step in (2, 3):
        (found,) = Run(tmp_path / "run").load_tensors(step).values()
        assert torch.equal(found, tensor)
        Run(tmp_path / "run").verify(step)
    assert same.written_bytes < 64 << 10


def test_extents_join_only_where_they_continue_one_file_and_are_no_chunks() -> None:
    first = _extent(0, 8192)
    assert follows(first, _extent(8192, 100))
    assert not follows(first, _extent(8192, 100, shard=1)), "of another file"
    assert not follows(first, _extent(12288, 100)), "a gap, which another rank writes"
    assert not follows(first, _extent(8192, 8192, item_bytes=4)), "a chunk for the codec"
    assert follows(_extent(5000, 3192, block_offset=5000 - 4096), _extent(8192, 4096))
    assert not follows(_extent(0, 5000), _extent(5000, 100)), "it would not lie in the slot as it does in the file"


def test_parts_of_a_slot_are_what_each_extents_own_slot_would_be() -> None:
    extents = [_extent(5000, 3192, block_offset=904), _extent(8192, 8192), _extent(16384, 10)]
    arena = Arena()
    arena.grow(MIB)
    unit = Units(extents, {}).of(0, 3)
    slot = arena.acquire(5 * 4096)
    slot.view[904 : 904 + 11394] = bytes(n % 251 for n in range(11394))
    found = b""
    for number, extent, part in unit.parts(slot):
        assert extent is extents[number]
        assert part.address % 4096 == 0
        assert part.tensor.data_ptr() == part.address
        found += bytes(part.view[extent.block_offset : extent.block_offset + extent.nbytes])
    assert found == bytes(n % 251 for n in range(11394))


def test_a_tensor_in_many_extents_of_a_unit_is_one_copy() -> None:
    extents = [Extent(0, n * 4096, 4096, b"", (Segment(0, n * 4096, 0, 4096),)) for n in range(16)]
    assert Units(extents, {}).of(0, 16).segments == (Segment(0, 0, 0, 65536),)
    assert Units(extents, {}).of(3, 2).segments == (Segment(0, 3 * 4096, 0, 8192),)


def test_units_that_are_kept_do_not_pile_up() -> None:
    extents = [_extent(n * 4096, 4096) for n in range(20)]
    kept: dict[tuple[int, int], Unit] = {}
    units = Units(extents, kept)
    for first in range(20):
        for count in range(1, 21 - first):
            assert units.of(first, count).extents == tuple(extents[first : first + count])
    assert len(kept) <= 2 * len(extents) + 1


def test_memory_that_is_short_gives_the_largest_part_that_fits() -> None:
    arena = Arena()
    arena.grow(64 << 10)
    arena.wait_prepared(10)
    held = arena.acquire(40 << 10)
    slot = arena.acquire([8 << 10, 16 << 10, 32 << 10])
    assert slot.nbytes == 16 << 10
    with pytest.raises(Exception, match="came free"):
        arena.acquire([16 << 10, 32 << 10], deadline=0.0)
    arena.release(held)
    assert arena.acquire([8 << 10, 32 << 10]).nbytes == 32 << 10


@pytest.mark.skipif(copying._set_threads is None, reason="torch was built without OpenMP")
def test_copies_leave_the_threads_of_training_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with copying._without_threads() as alone:
            assert alone
            seen: list[int] = []
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert seen == [2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class _Meeting(PosixOps):
    """No shard is durable before another thread is making one durable, too."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def fsync(self, fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            self.barrier.wait(20)
        super().fsync(fd)


def test_files_of_one_save_are_made_durable_side_by_side(tmp_path: Path) -> None:
    state = {name: torch.full((MIB,), float(n)) for n, name in enumerate("abcd")}
    with Checkpointer(tmp_path / "run", **by_stage(threads=1, staging_bytes=64 * MIB)) as run:
        run.prepare(state)
        store: Any = run._store
        store.ops = _Meeting()
        assert run.save(1, state).exception(60) is None
