"""Small shards wait for the large ones, and for nothing else."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
from conftest import bits

from asyncckpt import Checkpointer, StagingOptions, Zarr
from asyncckpt.memory.arena import Arena
from asyncckpt.testing import FaultyOps
from asyncckpt.types import SMALL_SHARD_BYTES, Extent, Layout, ShardFile
from asyncckpt.write.small_file_queue import SmallFileQueue
from asyncckpt.write.threads import Pools

LARGE = ShardFile("large", "m", SMALL_SHARD_BYTES + 1, (), (Extent(0, 0, 1, b"", ()),))
SMALL = [ShardFile(f"small-{n}", "m", 4096, (), (Extent(n + 1, 0, 1, b"", ()),)) for n in range(40)]


class Turns:
    """What has had its turn, of a save with one large shard and many small ones."""

    def __init__(self, *, budget_bytes: int = 1 << 20, large: int = 1) -> None:
        self.arena = Arena()
        self.arena.grow(budget_bytes)
        assert self.arena.wait_prepared(10)
        self.pools = Pools(2)
        self.shards = SmallFileQueue(Layout((LARGE,) * large + tuple(SMALL), 0, ""), self.pools, self.arena)
        self.ran: list[str] = []

    def submit(self, shard: ShardFile, nbytes: int = 4096) -> None:
        self.shards.submit(shard, nbytes, lambda: self.ran.append(shard.file))

    def settled(self) -> list[str]:
        """Once everything that was let go has run."""
        for pool in (self.pools.writing, self.pools.small):
            gate = threading.Barrier(1 + (2 if pool is self.pools.writing else 8))
            for _ in range(gate.parties - 1):
                pool.submit(lambda gate=gate: gate.wait(10))
            gate.wait(10)
        return self.ran


@pytest.fixture
def turns() -> Turns:
    return Turns()


def test_small_shards_wait_until_the_last_large_one_is_written() -> None:
    turns = Turns(large=2)
    for shard in (SMALL[0], LARGE, SMALL[1], LARGE):
        turns.submit(shard)
    assert turns.settled() == ["large", "large"]
    turns.shards.done(SMALL[3])
    turns.shards.done(LARGE)
    assert turns.settled() == ["large", "large"]
    turns.shards.done(LARGE)
    assert sorted(turns.settled()[2:]) == ["small-0", "small-1"]
    turns.submit(SMALL[2])
    assert "small-2" in turns.settled(), "it came late, and waits for ever"


def test_where_memory_is_waited_for_nothing_waits(turns: Turns) -> None:
    slot = turns.arena.acquire(1 << 20)
    turns.submit(SMALL[0])
    assert turns.settled() == []

    def waits() -> None:
        turns.arena.release(turns.arena.acquire(4096, if_short=turns.pools.start_held))

    waiter = threading.Thread(target=waits)
    waiter.start()
    while not turns.arena.waiting:
        pass
    turns.submit(SMALL[1])
    assert sorted(turns.settled()) == ["small-0", "small-1"]
    turns.arena.release(slot)
    waiter.join(10)


def test_what_waits_never_holds_more_than_its_share_of_the_arena(turns: Turns) -> None:
    for shard in SMALL:
        turns.submit(shard, 8192)
    assert len(turns.settled()) == len(SMALL) - (1 << 20) // 8 // 8192


def test_a_save_that_fails_leaves_nothing_waiting(turns: Turns) -> None:
    turns.submit(SMALL[0])
    turns.shards.flush()
    turns.shards.flush()
    assert turns.settled() == ["small-0"]


def _state() -> dict[str, dict[str, torch.Tensor]]:
    small = {f"{n:02}": torch.randn(50 + n) for n in range(60)}
    return {"m": {f"{n}.large": torch.randn(300, 300) for n in range(6)} | small}


@pytest.mark.parametrize("codec", ["none", "planes"])
@pytest.mark.parametrize("staging_bytes", [1 << 20, None])
def test_many_small_arrays_between_large_ones_come_back(codec: str, staging_bytes: int | None, tmp_path: Path) -> None:
    state = _state()
    with Checkpointer(
        tmp_path / "run", files=Zarr(codec=codec), staging=StagingOptions(budget_bytes=staging_bytes)
    ) as run:
        pending = [run.save(step, state) for step in (1, 2, 3)]
        for one in pending:
            one.result(60)
        fresh = _state()
        run.restore(fresh, step=3)
        assert bits(fresh) == bits(state)


def test_an_error_in_a_large_shard_ends_the_save_that_small_ones_wait_in(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", files=Zarr()) as run:
        run.prepare(_state())
        ops = run._store.ops = FaultyOps()
        ops.fail = ("pwrite", 2, errno.ENOSPC)
        assert run.save(1, _state()).exception(60) is not None
        assert run.ls() == []
        assert run.save(2, _state()).result(60).step == 2
        assert run._arena.free_bytes() == run._arena.budget_bytes
