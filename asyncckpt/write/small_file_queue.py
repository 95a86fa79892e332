"""Small shards wait until the large ones are written: an fsync amid large writes takes many times as long as one on a
quiet device, and there several at once take no longer than one (docs/design/006-zarr.md)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from asyncckpt.memory.arena import Arena
from asyncckpt.types import SMALL_SHARD_BYTES, Layout, ShardFile
from asyncckpt.write.threads import Pools, WriterPool

#: So few small shards or fewer do not wait: the threads that write everything else write them as they come.
_FEW = 16
#: Waiting extents hold at most one part in so many of the arena, which must never be full of them.
_SHARE = 8


class SmallFileQueue:
    """Decides on which threads, and when, the extents of one save's shards are worked on. Thread-safe; never blocks."""

    def __init__(self, layout: Layout, pools: Pools, arena: Arena) -> None:
        self._pools = pools
        self._arena = arena
        self._lock = threading.Lock()
        shards = [shard for shard in layout.shards if shard.extents]
        self._large = sum(not _is_small(shard) for shard in shards)
        self._few = len(shards) - self._large <= _FEW
        self._room = arena.budget_bytes // _SHARE
        self._waiting: list[Callable[[], None]] | None = None
        if not self._few and self._large:
            self._waiting = []
            pools.add_holding(self)

    def pool(self, shard: ShardFile) -> WriterPool:
        """Return the pool whose threads write this shard."""
        return self._pools.small if _is_small(shard) and not self._few else self._pools.writing

    def submit(self, shard: ShardFile, nbytes: int, task: Callable[[], None]) -> None:
        """Submit ``task``, which holds ``nbytes`` of the arena: now, or, for a small shard, once the large ones are
        written."""
        with self._lock:
            if self._waiting is not None and _is_small(shard) and nbytes <= self._room and not self._arena.waiting:
                self._room -= nbytes
                self._waiting.append(task)
                return
        self.pool(shard).submit(task)

    def done(self, shard: ShardFile) -> None:
        """Count a shard that is durable; after the last large one, start what waits."""
        if _is_small(shard):
            return
        with self._lock:
            self._large -= 1
            if self._large:
                return
        self.flush()

    def flush(self) -> None:
        """Start all tasks that wait. Called when the large shards are written, when any save waits for memory (it would
        wait for the memory held here), or when this save has failed. Idempotent."""
        with self._lock:
            held, self._waiting = self._waiting, None
        for task in held or ():
            self._pools.small.submit(task)
        if held is not None:
            self._pools.remove_holding(self)


def _is_small(shard: ShardFile) -> bool:
    return shard.nbytes <= SMALL_SHARD_BYTES
