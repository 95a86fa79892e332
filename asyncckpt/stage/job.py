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
from dataclasses import dataclass, replace

import torch

from asyncckpt import interrupts
from asyncckpt.errors import ArenaBusy, AsyncCkptError, SaveAbandoned, SaveFailed
from asyncckpt.events import EventBus, ExtentStaged, Staged, Stalled
from asyncckpt.memory.arena import Arena, QueuedCopy, StagingBuffer
from asyncckpt.protocols import Digest
from asyncckpt.scope import SaveScope
from asyncckpt.stage.checks import SnapshotChecks
from asyncckpt.stage.copy import can_split, copy_planes, copy_segments, fill_rest, host_writes, write_header
from asyncckpt.stage.image import finish_image, slot_bytes, staged_digests
from asyncckpt.stage.staged import ExtentSink, StagedExtent
from asyncckpt.stage.streams import Copies
from asyncckpt.types import Extent

log = logging.getLogger("asyncckpt")

#: On these devices, splitting chunks into planes before the copy costs next to nothing.
_DEVICES = {"cuda"}
#: A copy that has begun is milliseconds from its end; one that hangs even for this long must not hold training.
_COPY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Work:
    number: int
    extent: Extent

    def holds(self, pieces: Collection[int]) -> bool:
        """Whether one of these pieces lies in the extent."""
        return bool(pieces) and any(segment.piece in pieces for segment in self.extent.segments)


class StagingJob:
    """Makes the copies of one save. Thread-safe. ``scope``: the save's; an error here fails it at once, and nothing
    more is copied once it has failed.

    ``sink`` gets each extent as its copy is done or enqueued (CUDA copies run on a side stream). With ``digest``,
    extents that the background thread copies are digested at once, while their bytes are still in the processor's
    cache; the training thread never spends time on that. ``splits_on_device``: the codec takes chunks that were split
    into planes. ``checks``: of a snapshot that is copied while training goes on, or may be one day.
    """

    def __init__(
        self,
        scope: SaveScope,
        tensors: Sequence[torch.Tensor],
        extents: Sequence[Extent],
        arena: Arena,
        streams: Copies,
        sink: ExtentSink,
        events: EventBus,
        started_seconds: float,
        digest: Digest | None = None,
        splits_on_device: bool = False,
        checks: SnapshotChecks | None = None,
    ) -> None:
        self._digest = digest
        self._splits_on_device = splits_on_device
        self.step = scope.step
        self.stall_seconds = 0.0
        self.staged_seconds = 0.0
        self._tensors = tensors
        self._arena = arena
        self._sink = sink
        self._scope = scope
        self._events = events
        self._streams = streams
        self._lock = threading.Lock()
        self._queue = deque(_Work(number, extent) for number, extent in enumerate(extents))
        self._working: list[_Work] = []
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
            now = deque(work for work in self._queue if work.holds(wanted))
            chosen = {work.number for work in now}
            later = [work for work in self._queue if work.number not in chosen]
            self._queue.clear()  # in place: the stager may be working on this very queue
            self._queue.extend(later)
        self._work(now, deadline, None)
        with self._lock:  # after an error the rest goes back, to be dropped with everything else
            self._queue.extendleft(now)
        self._drop_queue()

    def run(self, deadline: float | None = None) -> None:
        """Work until nothing is left to start. Never raises: an error cancels the job."""
        self._work(self._queue, deadline, None)
        self._drop_queue()

    def run_in_background(self) -> None:
        """Do the work of ``run`` on a thread that training does not wait for: without deadline, and digesting copies
        that are made at once."""
        self._work(self._queue, None, None if self._streams else self._digest, patient=True)
        self._drop_queue()

    def _work(
        self, queue: deque[_Work], deadline: float | None, digest: Digest | None, *, patient: bool = False
    ) -> None:
        while True:
            with self._lock:
                if not queue or self._scope.error is not None:
                    return
                work = queue.popleft()
                self._working.append(work)
            try:
                interrupts.deliver()  # a large state takes seconds: whoever wants to leave need not wait for all of it
                self._stage(work, deadline, digest)
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
                return self._worked.wait_for(lambda: not any(work.holds(pieces) for work in self._working), seconds)

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
            way_out = "Leave more of the device's memory free, or save with codec='none', which takes none of it"
        typed = SaveFailed(
            f"step {self.step}: copying the state failed: {type(error).__name__}: {error}. Nothing was published; "
            f"earlier checkpoints are untouched. {way_out}"
        )
        typed.__cause__ = error
        return typed

    def _is_cancelled(self) -> bool:
        return self._scope.error is not None

    def _stage(self, work: _Work, deadline: float | None, digest: Digest | None) -> None:
        extent = work.extent
        slot = self._arena.acquire(slot_bytes(extent), deadline, self._is_cancelled, self._sink.give_memory_back)
        began = time.perf_counter()
        queued: list[QueuedCopy] = []
        try:
            tensors = self._tensors  # gone, once the save has failed: then this one fails, too
            if self.checks is not None:
                self.checks.before_copying(extent)
            on_device = any(tensors[segment.piece].device.type in _DEVICES for segment in extent.segments)
            split = self._splits_on_device and on_device and can_split(tensors, extent)
            if slot.copies and (split or host_writes(tensors, extent)):
                for earlier in slot.copies:  # of a save that failed: the device orders its own copies, not ours
                    earlier.wait()
            if split:
                slot = replace(slot, split=True)
            copy = functools.partial(_copy, tensors, extent, slot)
            self._streams.enqueue(copy, slot.copies, queued)
            if extent.header:
                write_header(slot, extent.header)
            finish_image(extent, slot)
            taken = staged_digests(digest, extent, slot) if digest is not None else None
        except BaseException:
            self._arena.release(replace(slot, copies=(*slot.copies, *queued)))
            raise
        if queued:
            slot = replace(slot, copies=tuple(queued))
        now = time.perf_counter()
        try:
            self._events.emit(ExtentStaged(step=self.step, at_seconds=now, nbytes=extent.nbytes, seconds=now - began))
        except BaseException:  # a subscriber that was interrupted
            self._arena.release(slot)
            raise
        copied = functools.partial(self._copied, work.number, slot, queued)
        self._sink.submit(StagedExtent(work.number, slot, copied, taken))

    def _copied(self, number: int, slot: StagingBuffer, queued: Sequence[QueuedCopy]) -> None:
        """Wait until the copies into a slot have run, and check what they have brought."""
        for copy in queued:
            copy.wait()
        if self.checks is not None:
            self.checks.copied(number, slot)

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
            self.staged_seconds = now - self._started_seconds
            self._done.set()
        if self._scope.error is None:
            self._events.emit(Staged(step=self.step, at_seconds=now, nbytes=self._nbytes, seconds=self.staged_seconds))

    def _is_copied(self) -> bool:
        return not (self._queue or self._working or self._done.is_set() or self._concluding)


def _copy(tensors: Sequence[torch.Tensor], extent: Extent, slot: StagingBuffer) -> None:
    if slot.split:
        copy_planes(tensors, extent, slot)
    else:
        copy_segments(tensors, extent.segments, slot)
        fill_rest(slot, extent)
