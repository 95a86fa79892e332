"""Staging: snapshot → arena. What may change soon is copied before ``save`` returns, the rest while training goes on.

A staging job can be worked on by several threads at once: the stager in the background, and the training thread when
it has to wait anyway (an eager save, or ``optimizer.step`` coming before the copy is done).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from asyncckpt import interrupts
from asyncckpt.errors import ArenaBusy, AsyncCkptError, SaveAbandoned, SaveFailed
from asyncckpt.events import EventBus, ExtentStaged, Staged, Stalled
from asyncckpt.memory.arena import Arena, QueuedCopy, StagingBuffer
from asyncckpt.scope import SaveScope
from asyncckpt.stage.checks import SnapshotChecks
from asyncckpt.stage.copy import can_split, copy_planes, copy_segments, fill_gaps, host_writes, write_header
from asyncckpt.stage.image import finish_image, slot_bytes
from asyncckpt.stage.staged import StagedUnit, UnitSink
from asyncckpt.stage.streams import Copies
from asyncckpt.stage.units import Unit, Units, follows, places_in_slot, unit_bytes
from asyncckpt.types import Extent, Layout

log = logging.getLogger("asyncckpt")

#: On these devices, splitting chunks into planes before the copy costs next to nothing.
_DEVICES = {"cuda"}
#: A copy that has begun is milliseconds from its end; one that hangs even for this long must not hold training.
_COPY_SECONDS = 60.0


#: An extent and its index in the layout.
_Numbered = tuple[int, Extent]


def _holds(work: Sequence[_Numbered], pieces: Collection[int]) -> bool:
    """Whether one of these pieces lies in one of the extents."""
    return bool(pieces) and any(segment.piece in pieces for _, extent in work for segment in extent.segments)


class StagingJob:
    """Makes the copies of one save. Thread-safe. ``scope``: the save's; an error here fails it at once, and nothing
    more is copied once it has failed.

    ``sink`` gets the layout's extents in units, each as its copy is done or enqueued (CUDA copies run on a side
    stream). ``splits_on_device``: the codec takes chunks that were split into planes. ``checks``: of a snapshot that is
    copied while training goes on, or may be one day.
    """

    #: Whether the snapshot is apart from training's memory once ``save`` returns, so that nothing waits for this job.
    is_apart = False
    #: What to do where a device has no memory for the copies.
    _without_memory = "Leave more of the device's memory free, or save with codec='none', which takes none of it"

    def __init__(
        self,
        scope: SaveScope,
        tensors: Sequence[torch.Tensor],
        layout: Layout,
        arena: Arena,
        streams: Copies,
        sink: UnitSink,
        events: EventBus,
        started_seconds: float,
        splits_on_device: bool = False,
        checks: SnapshotChecks | None = None,
    ) -> None:
        self._splits_on_device = splits_on_device
        self.step = scope.step
        self.stall_seconds = 0.0
        self.staged_seconds = 0.0
        self._tensors = tensors
        self._arena = arena
        self._sink = sink
        self._scope = scope
        self._events = events
        self._streams: Copies = streams
        self._lock = threading.Lock()
        extents = layout.extents()
        self._units = Units(extents, layout.cache.setdefault("units", {}))
        self._queue: deque[_Numbered] = deque(enumerate(extents))
        self._working: list[Sequence[_Numbered]] = []
        self._worked = threading.Condition(self._lock)
        self.checks = checks
        self._arrived = threading.Event()
        self._concluding = False
        self._done = threading.Event()
        self._started_seconds = started_seconds
        self._nbytes = sum(extent.nbytes for extent in extents)
        if not self._queue:
            self._done.set()
        scope.when_failed(self._give_up)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def on_device(self) -> bool:
        """Whether copies run on CUDA streams; ``done`` then means that all are enqueued."""
        return bool(self._streams)

    def stage_now(self, eager: Collection[int], deadline: float | None) -> None:
        """Copy every extent that holds one of the pieces in ``eager`` before returning.

        Whole extents, so that a slot is never held half filled: two saves doing that could wait for each other's.
        Never raises: an error cancels the job.
        """
        self._work_on(eager, deadline)
        self._hold_training_back()

    def _work_on(self, wanted: Collection[int], deadline: float | None) -> None:
        """Copy every extent that holds one of the pieces in ``wanted`` and that no thread has begun."""
        with self._lock:
            now = deque(one for one in self._queue if _holds((one,), wanted))
            chosen = {number for number, _ in now}
            later = [one for one in self._queue if one[0] not in chosen]
            self._queue.clear()  # in place: the stager may be working on this very queue
            self._queue.extend(later)
        self._work(now, deadline)
        with self._lock:  # after an error the rest goes back, to be dropped with everything else
            self._queue.extendleft(now)
        self._drop_queue()

    def run(self, deadline: float | None = None) -> None:
        """Work until nothing is left to start. Never raises: an error cancels the job."""
        self._work(self._queue, deadline)
        self._drop_queue()

    def run_in_background(self) -> None:
        """Do the work of ``run`` on a thread that training does not wait for, without deadline."""
        self._work(self._queue, None, patient=True)
        self._drop_queue()

    def _work(self, queue: deque[_Numbered], deadline: float | None, *, patient: bool = False) -> None:
        while True:
            with self._lock:
                if not queue or self._scope.error is not None:
                    return
                work = self._next(queue)
                self._working.append(work)
            try:
                interrupts.deliver()  # a large state takes seconds: whoever wants to leave need not wait for all of it
                self._stage(work, deadline)
            except ArenaBusy as error:
                self.cancel(self._too_slow(error))
            except Exception as error:
                self.cancel(self._typed(error))
            except BaseException as error:  # Ctrl-C on the training thread goes on up; the save cannot
                self.cancel(self._interrupted(error))
                raise
            finally:
                with self._worked:
                    self._working.remove(work)
                    self._worked.notify_all()
                self._settle(patient)

    def _next(self, queue: deque[_Numbered]) -> list[_Numbered]:
        """Take the extents of one unit from the queue. Call it with the lock held."""
        work = [queue.popleft()]
        room = unit_bytes(self._arena.budget_bytes) - work[0][1].nbytes
        while queue:
            (last, before), (number, extent) = work[-1], queue[0]
            room -= extent.nbytes
            if room < 0 or number != last + 1 or not follows(before, extent):
                break
            work.append(queue.popleft())
        return work

    def training_waits(self) -> None:
        """The training thread is here, so none of its operations is changing a tensor. Never blocks."""
        self._arrived.set()

    def finish(self, deadline: float | None, pieces: Collection[int] | None = None) -> None:
        """Help, then block until every copy is done (CUDA: until the current streams wait for them), or every copy of
        ``pieces``, by index.

        Past ``deadline`` (``time.monotonic()``) the job is cancelled with ``SaveAbandoned``: training goes on, the
        save fails. Never raises.
        """
        self.training_waits()
        if pieces is None:
            self.run(deadline)
        else:
            self._work_on(pieces, deadline)
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            if not self._wait_for(pieces, remaining):
                self.cancel(self._too_slow(None))
                self._wait_for(pieces, _COPY_SECONDS)
        except BaseException as error:  # nobody knows what is changed now, while a thread of ours copies
            self.cancel(self._interrupted(error))
            raise
        self._hold_training_back()

    def _wait_for(self, pieces: Collection[int] | None, timeout: float | None) -> bool:
        """Block until every copy of ``pieces`` is done (None: of all); False when ``timeout`` seconds passed first."""
        if pieces is None:
            return interrupts.wait_for(self._done.wait, timeout)

        def copied(seconds: float) -> bool:
            with self._worked:
                return self._worked.wait_for(lambda: not any(_holds(work, pieces) for work in self._working), seconds)

        return interrupts.wait_for(copied, timeout)

    def wait(self, timeout: float | None) -> bool:
        """Block until every copy is done (CUDA: has run, if deferred), without helping; False when ``timeout`` seconds
        passed first."""
        if not self._done.wait(timeout):
            return False
        if self._streams and self.checks is not None:
            with contextlib.suppress(RuntimeError):  # the threads that write fail the save
                self._streams.synchronize()
                self.checks.settle()
        return True

    def note_stall(self, began_seconds: float, where: str) -> None:
        """Record that training has waited for this save since ``began_seconds``, by ``time.perf_counter``. For the
        training thread. ``where``: for the event."""
        now = time.perf_counter()
        self.stall_seconds += now - began_seconds
        self._events.emit(Stalled(step=self.step, at_seconds=now, seconds=now - began_seconds, where=where))

    def synchronize(self) -> None:
        """Block until enqueued CUDA copies have run."""
        self._streams.synchronize()

    def forget(self) -> None:
        """Drop the references to the tensors: whoever keeps a ``PendingSave`` must not keep them alive. Call it once
        every copy has run, or the save has failed."""
        self._tensors = ()
        if self.checks is not None:
            self.checks.forget()

    def cancel(self, error: BaseException, *, late: bool = False) -> None:
        """Fail the save with ``error``, unless all its copies are made or enqueued already; with ``late``, even then.
        Idempotent."""
        if late or not self._done.is_set():
            self._scope.fail(error)

    def _give_up(self) -> None:
        self._arena.wake()
        self._drop_queue()

    def _too_slow(self, cause: BaseException | None) -> SaveAbandoned:
        why = f" ({cause})" if cause is not None else ""
        return SaveAbandoned(
            f"step {self.step}: staging did not finish within its deadline{why}, so the save was given up and training "
            f"goes on. Storage is too slow or hangs; look at it, or raise StagingOptions.budget_bytes"
        )

    def _hold_training_back(self) -> None:
        """Make what training enqueues from now on run after the copies."""
        try:
            self._streams.make_current_wait()
        except Exception as error:
            self.cancel(self._typed(error), late=True)

    def _interrupted(self, cause: BaseException) -> SaveAbandoned:
        error = SaveAbandoned(f"step {self.step}: interrupted while the state was being copied")
        error.__cause__ = cause
        return error

    def _typed(self, error: Exception) -> Exception:
        if isinstance(error, AsyncCkptError):
            return error
        way_out = "Look at the device, then save again"
        if isinstance(error, torch.OutOfMemoryError):
            way_out = self._without_memory
        typed = SaveFailed(
            f"step {self.step}: copying the state failed: {type(error).__name__}: {error}. Nothing was published; "
            f"earlier checkpoints are untouched. {way_out}"
        )
        typed.__cause__ = error
        return typed

    def _is_cancelled(self) -> bool:
        return self._scope.error is not None

    def _stage(self, work: Sequence[_Numbered], deadline: float | None) -> None:
        """Stage these extents, in one unit or, where memory is short, in several. All of them are in ``_working`` until
        the last one is copied."""
        while work and self._scope.error is None:
            work = work[self._stage_unit(work, deadline) :]
            interrupts.deliver()

    def _stage_unit(self, work: Sequence[_Numbered], deadline: float | None) -> int:
        """Stage as many of these extents as there is room for now; return how many. Blocks until there is room for
        one."""
        extents = [extent for _, extent in work]
        sizes = [place + slot_bytes(extent) for place, extent in zip(places_in_slot(extents), extents, strict=True)]
        slot = self._arena.acquire(sizes, deadline, self._is_cancelled, self._sink.give_memory_back)
        count = sum(size <= slot.nbytes for size in sizes)
        began = time.perf_counter()
        queued: list[QueuedCopy] = []
        try:
            unit = self._units.of(work[0][0], count)
            slot = self._copy(unit, slot, queued)
        except BaseException:
            self._arena.release(replace(slot, copies=(*slot.copies, *queued)))
            raise
        if queued:
            slot = replace(slot, copies=tuple(queued))
        now = time.perf_counter()
        try:
            self._events.emit(ExtentStaged(step=self.step, at_seconds=now, nbytes=unit.nbytes, seconds=now - began))
        except BaseException:  # a subscriber that was interrupted
            self._arena.release(slot)
            raise
        copied = functools.partial(self._copied, unit, slot, queued)
        self._sink.submit(StagedUnit(unit, slot, copied))
        return count

    def _copy(self, unit: Unit, slot: StagingBuffer, queued: list[QueuedCopy]) -> StagingBuffer:
        """Copy a unit into the slot, or enqueue its copies, and return the slot as it is filled."""
        tensors = self._tensors  # gone, once the save has failed: then this one fails, too
        if self.checks is not None:
            for extent in unit.extents:
                self.checks.before_copying(extent)
        split = False
        if self._splits_on_device and self._streams:
            (first, *others) = unit.extents
            on_device = any(tensors[segment.piece].device.type in _DEVICES for segment in first.segments)
            split = not others and on_device and can_split(tensors, first)
        if slot.copies and (split or host_writes(tensors, unit)):
            for earlier in slot.copies:  # of a save that failed: the device orders its own copies, not ours
                earlier.wait()
        if split:
            slot = replace(slot, split=True)
        self._streams.enqueue(functools.partial(_copy, tensors, unit, slot), slot.copies, queued)
        for extent, place in zip(unit.extents, unit.places, strict=True):
            if extent.header:
                write_header(slot, place, extent.header)
        finish_image(unit.extents[0], slot)
        return slot

    def _copied(self, unit: Unit, slot: StagingBuffer, queued: Sequence[QueuedCopy]) -> None:
        """Wait until the copies into a slot have run, and check what they have brought."""
        try:
            for copy in queued:
                copy.wait()
        except RuntimeError as error:  # the writers would say that their storage has failed
            raise self._typed(error) from error
        if self.checks is not None:
            for number, _, part in unit.parts(slot):
                self.checks.copied(number, part)

    def _drop_queue(self) -> None:
        if self._scope.error is not None:
            with self._lock:
                self._queue.clear()
        self._settle()

    def _settle(self, patient: bool = False) -> None:
        """End the job if every copy has been made. ``patient``: training does not wait for this thread."""
        with self._lock:
            if not self._is_copied():
                return
        if patient and self.checks is not None and not self._streams and self._scope.error is None:
            self._arrived.wait(self.checks.patience_seconds)
        with self._lock:
            if not self._is_copied():
                return
            self._concluding = True
        try:
            if self.checks is not None and not self._streams and self._scope.error is None:
                self.checks.settle()
        except BaseException as error:
            self.cancel(self._interrupted(error))
            raise
        finally:
            now = time.perf_counter()
            self.staged_seconds = self._scope.staged_seconds = now - self._started_seconds
            self._done.set()
        if self._scope.error is None:
            self._events.emit(Staged(step=self.step, at_seconds=now, nbytes=self._nbytes, seconds=self.staged_seconds))

    def _is_copied(self) -> bool:
        return not (self._queue or self._working or self._done.is_set() or self._concluding)


def _copy(tensors: Sequence[torch.Tensor], unit: Unit, slot: StagingBuffer) -> None:
    if slot.split:
        copy_planes(tensors, unit.extents[0], slot)
    else:
        copy_segments(tensors, unit.segments, slot)
        fill_gaps(slot, unit.gaps)
