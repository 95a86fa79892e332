"""The arena is reusable host memory that extents are staged in, within a budget of bytes.

A thread of its own faults it in, piece by piece, and pins it for CUDA, once: in fresh memory page faults cost more than
ten times the copy (docs/design/001-arena.md).
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from asyncckpt import forks, interrupts
from asyncckpt.errors import ArenaBusy, InvalidOption, NotEnoughMemory
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.memory.available import available_memory_bytes
from asyncckpt.memory.buffers import padded
from asyncckpt.memory.region import Region
from asyncckpt.types import ALIGNMENT_BYTES

if TYPE_CHECKING:
    import torch

log = logging.getLogger("asyncckpt")

_FAULT_IN_BYTES = 16 << 20
#: After so many bytes that were faulted in, the memory that is free is looked at again.
_LOOK_BYTES = 64 << 20


class QueuedCopy(Protocol):
    """A queued copy is one into staging memory that was enqueued on a device and may not have run yet."""

    def done(self) -> bool:
        """Return whether the copy has run. May raise ``RuntimeError`` where the device cannot say."""

    def wait(self) -> None:
        """Block until the copy has run. Raises ``RuntimeError`` where the device has failed."""

    def wait_on(self, stream: Any) -> None:
        """Make everything that is enqueued on ``stream`` from now on run after this copy. Does not block."""


#: A free part of the arena is its region, offset, bytes, and the copies that may still write there.
_Free = tuple[int, int, int, tuple[QueuedCopy, ...]]


@dataclass(frozen=True, slots=True)
class StagingBuffer:
    """A slot is a part of the arena. ``view`` is its memory, which begins at ``address``: it is writable, aligned to
    pages and ``nbytes`` long, a multiple of 4096. ``split``: it holds a chunk whose bytes the device has split into
    planes. ``copies`` may still write into it: they belong to the save that had the slot before, or, once this save has
    enqueued copies, to this save."""

    region: int
    offset: int
    nbytes: int
    address: int
    view: memoryview
    split: bool = False
    copies: tuple[QueuedCopy, ...] = ()

    def part(self, offset: int, nbytes: int) -> StagingBuffer:
        """Return ``nbytes`` of this slot from ``offset`` on, which must be a multiple of 4096. They are released with
        the whole."""
        view = self.view[offset : offset + nbytes]
        return StagingBuffer(self.region, self.offset + offset, nbytes, self.address + offset, view, self.split)

    @property
    def tensor(self) -> torch.Tensor:
        """The slot's memory as a uint8 tensor, which is made anew each time. Only for a process that has torch."""
        loaded = loaded_torch()
        made: torch.Tensor = loaded.frombuffer(self.view, dtype=loaded.uint8)
        return made


class Arena:
    """Hands out staging memory in slots, within a budget of bytes. Thread-safe.

    ``grow`` adds memory up to the budget. A background thread faults it in, and each part can be handed out as soon as
    it is ready. ``shared``: what is added from now on can be mapped by another process, too (``descriptor``).
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        self.budget_bytes = 0
        self._regions: dict[int, Region] = {}
        self._used_bytes: dict[int, int] = {}  # by region
        #: These are sorted and never adjacent.
        self._free: list[_Free] = []
        self._changed = threading.Condition()
        self._faulting = 0
        #: So many threads wait for memory.
        self.waiting = 0
        self._cold_bytes = 0
        self._closed = False
        # an arena that is dropped without being closed must not be unmapped under queued copies either
        forks.finalize(self, _end, self._free, self._regions)

    def grow(self, budget_bytes: int, *, largest_bytes: int = 0, pin: torch.device | None = None) -> None:
        """Raise the budget to at least ``budget_bytes``, so that a slot of ``largest_bytes`` fits into one region.
        Returns at once; memory becomes available as it is ready. ``pin``: the CUDA device that registers it, so that
        copies overlap with kernels. Where the system gives less, the budget is smaller, and saves stage piece by piece;
        where not even one slot of ``largest_bytes`` fits, raises ``NotEnoughMemory``."""
        with self._changed:
            extra = budget_bytes - self.budget_bytes
            lacking = self._largest_bytes() < largest_bytes
            least = padded(largest_bytes) if lacking else 0
            extra = max(padded(extra), least)
            if extra <= 0 or self._closed:
                return
            region = self._allocate(extra, least)
            if region is None:
                return
            number = len(self._regions)
            self._regions[number] = region
            self._used_bytes[number] = 0
            self.budget_bytes += region.nbytes
            self._faulting += 1
            self._cold_bytes += region.nbytes
        try:
            prepared = (number, region, pin, max(least, ALIGNMENT_BYTES))
            threading.Thread(target=self._prepare, args=prepared, name="asyncckpt-arena", daemon=True).start()
        except RuntimeError:  # the system gives no more threads
            self._prepare(*prepared)

    def _allocate(self, wanted: int, least: int) -> Region | None:
        """Return as much of ``wanted`` bytes as the system gives, at least ``least``. Returns None where it gives
        nothing and ``least`` is 0."""
        nbytes = wanted
        while True:
            try:
                return Region(nbytes, shared=self.shared)
            except (OSError, MemoryError) as error:
                if nbytes <= max(least, ALIGNMENT_BYTES):
                    if not least:
                        log.warning("no more staging memory than %d bytes: saves take longer", self.budget_bytes)
                        return None
                    raise NotEnoughMemory(
                        f"the system gives no {nbytes} bytes of memory to stage an extent in ({error}). Free memory, "
                        f"raise the process's limit, or give a smaller StagingOptions.budget_bytes"
                    ) from error
                nbytes = max(least, padded(nbytes // 4))  # in large steps: others need memory, too

    def acquire(
        self,
        nbytes: int | Sequence[int],
        deadline: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        if_short: Callable[[], None] = lambda: None,
    ) -> StagingBuffer:
        """Return a slot of at least ``nbytes``; of several sizes, in ascending order, the largest for which there is
        room now. Blocks until there is room for the smallest. ``if_short``: called once before it waits, with
        ``waiting`` raised already; it must not block.

        Raises ``ArenaBusy`` once ``time.monotonic()`` passes ``deadline``, ``cancelled()`` is true (see ``wake``) or
        the arena is closed, and ``InvalidOption`` where no region can ever hold the smallest slot.
        """
        sizes = [nbytes] if isinstance(nbytes, int) else nbytes
        needs = [padded(size) for size in reversed(sizes)]
        while (slot := self._acquire(needs, deadline, cancelled, if_short)) is None:
            interrupts.deliver()
        return slot

    def _acquire(
        self,
        needs: Sequence[int],
        deadline: float | None,
        cancelled: Callable[[], bool],
        if_short: Callable[[], None],
    ) -> StagingBuffer | None:
        """Do what ``acquire`` says, given the sizes in descending order; returns None early where a signal is to be
        acted on."""
        with self._changed:
            need = needs[-1]
            if need > self._largest_bytes() and not self._closed:
                raise InvalidOption(
                    f"the arena of {self.budget_bytes} bytes cannot hold an extent of {need} bytes; raise "
                    f"StagingOptions.budget_bytes"
                )
            slot = self._take(needs)
            if slot is not None:
                return slot
            self.waiting += 1
            try:
                if_short()
                while True:
                    remaining = None if deadline is None else deadline - time.monotonic()
                    if self._closed or cancelled() or (remaining is not None and remaining <= 0):
                        raise ArenaBusy(f"no {need} bytes of the {self.budget_bytes} byte arena came free in time")
                    self._changed.wait(interrupts.slice_of(remaining))
                    slot = self._take(needs)
                    if slot is not None or interrupts.pending():
                        return slot
            finally:
                self.waiting -= 1

    def _take(self, needs: Sequence[int]) -> StagingBuffer | None:
        if self._closed:
            return None
        largest = max((size for _, _, size, _ in self._free), default=0)
        need = next((need for need in needs if need <= largest), None)
        if need is None:
            return None
        for position, (region, offset, size, copies) in enumerate(self._free):
            if size >= need:
                if size == need:
                    del self._free[position]
                else:
                    self._free[position] = (region, offset + need, size - need, copies)
                return self._slot(region, offset, need, _not_done(copies))
        return None

    def release(self, slot: StagingBuffer) -> None:
        """Give a slot back; whatever is still in it may be overwritten at once. Copies into it that have not run yet go
        with the memory to whoever takes it next. Where the arena is closed already, this blocks until they have run."""
        copies = _not_done(slot.copies)
        with self._changed:
            closed = self._closed
            if not closed or not copies:
                self._give_back(slot, copies)
        if closed and copies:
            _end([(slot.region, slot.offset, slot.nbytes, copies)], self._regions)
            with self._changed:
                self._give_back(slot, ())

    def _give_back(self, slot: StagingBuffer, copies: tuple[QueuedCopy, ...]) -> None:
        self._used_bytes[slot.region] -= slot.nbytes
        self._put(slot.region, slot.offset, slot.nbytes, copies)
        if self._closed:
            self._let_go()

    def descriptor(self, region: int) -> tuple[int, int]:
        """Return the descriptor by which another process can map a region, and how many bytes it has. The descriptor is
        -1 where the region is not shared."""
        return self._regions[region].fd, len(self._regions[region].memory)

    def free_bytes(self) -> int:
        """Return how many bytes can be staged without waiting for a write; memory that is still faulted in counts."""
        with self._changed:
            return self._cold_bytes + sum(size for _, _, size, _ in self._free)

    def wake(self) -> None:
        """Make every thread that waits in ``acquire`` look at its ``cancelled`` again."""
        with self._changed:
            self._changed.notify_all()

    def wait_prepared(self, timeout: float | None = None) -> bool:
        """Block until all memory is faulted in. Returns False where ``timeout`` seconds passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._faulting, timeout)

    def close(self) -> None:
        """Wake whoever waits, and give the memory back. A region that is in use goes with its last slot, and one that
        copies are queued into once they have run. Waits for neither: a device that hangs must not hold the caller."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            queued = [free for free in self._free if _not_done(free[3])]
            if not queued:
                self._let_go()
                return
        threading.Thread(target=self._let_go_after, args=(queued,), name="asyncckpt-arena-end", daemon=True).start()

    def _let_go_after(self, queued: Sequence[_Free]) -> None:
        _end(queued, self._regions)
        with self._changed:
            self._let_go()

    def _let_go(self) -> None:
        """Unmap the regions that nobody uses any more. For a closed arena."""
        for number, used_bytes in self._used_bytes.items():
            if not used_bytes:
                self._regions.pop(number, None)

    def _largest_bytes(self) -> int:
        return max((region.nbytes for region in self._regions.values()), default=0)

    def _prepare(self, number: int, region: Region, pin: torch.device | None, least: int) -> None:
        try:
            if pin is not None:  # all of it is faulted in at once
                self._shorten(region, 0, least)
                if self.shared and not region.fault_in(0, region.nbytes):  # the driver would touch what is not there
                    self._cut(region, 0)
                    return
                region.pin(pin)
            offset = 0
            while offset < region.nbytes and not self._closed:
                if pin is None and offset % _LOOK_BYTES == 0:
                    self._shorten(region, offset, least)
                size = min(_FAULT_IN_BYTES, region.nbytes - offset)
                if size <= 0:
                    return
                if not region.fault_in(offset, size):
                    self._cut(region, offset)
                    return
                with self._changed:
                    self._cold_bytes -= size
                self._put(number, offset, size)
                offset += size
        finally:
            with self._changed:
                self._faulting -= 1
                self._changed.notify_all()

    def _shorten(self, region: Region, offset: int, least: int) -> None:
        """Do without the rest of a region, from ``offset`` on, as far as it would take more than half of the memory
        that is free now: since the budget was made, others may have taken theirs. ``least`` bytes stay in any case."""
        affordable = available_memory_bytes() // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        nbytes = max(offset + affordable, least, offset)
        if nbytes < region.nbytes:
            self._cut(region, nbytes)

    def _cut(self, region: Region, nbytes: int) -> None:
        """Do without what a region has beyond ``nbytes``, none of which was handed out."""
        log.warning(
            "memory is short: %d bytes of staging memory instead of %d; saves take longer",
            self.budget_bytes - (region.nbytes - nbytes),
            self.budget_bytes,
        )
        with self._changed:
            self.budget_bytes -= region.nbytes - nbytes
            self._cold_bytes -= region.nbytes - nbytes
            region.nbytes = nbytes  # the rest stays mapped, and is never touched
            self._changed.notify_all()

    def _put(self, region: int, offset: int, nbytes: int, copies: tuple[QueuedCopy, ...] = ()) -> None:
        with self._changed:
            at = bisect.bisect_left(self._free, (region, offset), key=lambda free: free[:2])
            if at < len(self._free):
                after_region, after_offset, after_size, after_copies = self._free[at]
                if (after_region, after_offset) == (region, offset + nbytes):
                    del self._free[at]
                    nbytes += after_size
                    copies = (*copies, *after_copies)
            if at:
                before_region, before_offset, before_size, before_copies = self._free[at - 1]
                if (before_region, before_offset + before_size) == (region, offset):
                    at -= 1
                    del self._free[at]
                    offset, nbytes = before_offset, before_size + nbytes
                    copies = (*before_copies, *copies)
            # neighbours that one save has used share their copies: keep each only once
            self._free.insert(at, (region, offset, nbytes, tuple(dict.fromkeys(copies)) if copies else ()))
            self._changed.notify_all()

    def _slot(self, region: int, offset: int, nbytes: int, copies: tuple[QueuedCopy, ...]) -> StagingBuffer:
        home = self._regions[region]
        self._used_bytes[region] += nbytes
        return StagingBuffer(
            region,
            offset,
            nbytes,
            home.address + offset,
            home.view[offset : offset + nbytes],
            copies=copies,
        )


def _not_done(copies: tuple[QueuedCopy, ...]) -> tuple[QueuedCopy, ...]:
    """Return the copies that may still write. They include those whose device cannot say, because it failed or is being
    captured."""
    return tuple(copy for copy in copies if not _has_run(copy)) if copies else ()


def _has_run(copy: QueuedCopy) -> bool:
    try:
        return copy.done()
    except RuntimeError:
        return False


def _end(free: Iterable[_Free], regions: Mapping[int, Region]) -> None:
    """Wait for the copies that are queued into free memory. Where a device cannot say that its copy has run, the region
    stays mapped for the life of the process."""
    for number, _, _, copies in free:
        for copy in copies:
            try:
                copy.wait()
            except RuntimeError as error:
                region = regions.get(number)
                if region is not None and region not in _never_unmapped:
                    log.error("%d bytes of staging memory are kept: %s", region.nbytes, error)
                    _never_unmapped.append(region)


#: A device may still write into these regions, as far as anybody knows.
_never_unmapped: list[Region] = []
