"""The arena: a byte budget that is never exceeded, never handed out twice, and never leaks."""

from __future__ import annotations

import errno
import mmap
import random
import threading
import time
import weakref

import pytest

from asyncckpt.errors import ArenaBusy, InvalidOption
from asyncckpt.memory.arena import Arena, StagingBuffer
from asyncckpt.memory.buffers import aligned_buffer


def test_slots_never_overlap_and_all_memory_comes_back() -> None:
    arena = Arena()
    arena.grow(1 << 20)
    arena.grow(3 << 19)  # a second region
    assert arena.wait_prepared(10)
    whole = arena.free_bytes()
    rng = random.Random(7)
    held: list[StagingBuffer] = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            slot = held.pop(rng.randrange(len(held)))
            assert bytes(slot.view[:4]) == slot.offset.to_bytes(4, "little"), "another slot wrote into this one"
            arena.release(slot)
        else:
            try:
                slot = arena.acquire(rng.randrange(1, 200_000), deadline=time.monotonic())
            except ArenaBusy:
                continue
            slot.view[:4] = slot.offset.to_bytes(4, "little")
            held.append(slot)
        assert arena.free_bytes() + sum(slot.nbytes for slot in held) == whole
    for slot in held:
        arena.release(slot)
    biggest = arena.acquire(1 << 20, deadline=time.monotonic())  # coalesced again
    assert biggest.nbytes == 1 << 20


def test_slots_are_aligned_for_direct_io() -> None:
    arena = Arena()
    arena.grow(1 << 20)
    slots = [arena.acquire(size) for size in (1, 4097, 10_000)]
    assert all(slot.address % 4096 == 0 and slot.nbytes % 4096 == 0 for slot in slots)
    assert [slot.nbytes for slot in slots] == [4096, 8192, 12288]


def test_acquire_waits_for_a_release_and_no_longer() -> None:
    arena = Arena()
    arena.grow(8192)
    slot = arena.acquire(8192)
    with pytest.raises(ArenaBusy, match="8192"):
        arena.acquire(4096, deadline=time.monotonic() + 0.05)
    threading.Timer(0.05, arena.release, [slot]).start()
    assert arena.acquire(4096, deadline=time.monotonic() + 10).nbytes == 4096


def test_a_cancelled_wait_ends_at_once() -> None:
    arena = Arena()
    arena.grow(4096)
    arena.acquire(4096)
    stop = threading.Event()

    def cancel() -> None:
        stop.set()
        arena.wake()

    threading.Timer(0.05, cancel).start()
    with pytest.raises(ArenaBusy):
        arena.acquire(4096, deadline=time.monotonic() + 60, cancelled=stop.is_set)


def test_an_extent_larger_than_the_budget_is_refused_instead_of_waiting_for_ever() -> None:
    arena = Arena()
    arena.grow(8192)
    with pytest.raises(InvalidOption, match="budget_bytes"):
        arena.acquire(12288)


def test_memory_being_faulted_in_counts_as_free() -> None:
    arena = Arena()
    arena.grow(256 << 20)
    assert arena.free_bytes() == 256 << 20
    arena.close()


def test_a_closed_arena_gives_its_memory_back_with_the_last_slot() -> None:
    arena = Arena()
    arena.grow(8192)
    assert arena.wait_prepared(10)
    gone = weakref.ref(arena._regions[0])
    slot = arena.acquire(4096)
    arena.close()
    assert gone() is not None, "memory was taken away from whoever still uses it"
    arena.release(slot)
    assert gone() is None


def test_a_closed_arena_hands_out_nothing() -> None:
    arena = Arena()
    arena.grow(4096)
    arena.close()
    with pytest.raises(ArenaBusy):
        arena.acquire(4096)


class _WithoutHugePages(mmap.mmap):
    """Memory of a kernel that was built without transparent huge pages."""

    def madvise(self, option: int, *args: int) -> None:
        if option == mmap.MADV_HUGEPAGE:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().madvise(option, *args)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux")
def test_a_kernel_without_huge_pages_gives_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save failed there: its answer was taken for memory that cannot be had."""
    monkeypatch.setattr(mmap, "mmap", _WithoutHugePages)
    arena = Arena()
    arena.grow(1 << 20)
    assert arena.wait_prepared(10)
    arena.release(arena.acquire(1 << 20, deadline=time.monotonic()))
    assert len(aligned_buffer(4 << 20)) == 4 << 20
