"""The committer publishes one save after the other, acknowledges it, and only then applies retention."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from asyncckpt import interrupts
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.newest import LATEST
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.catalog.retention import Policy
from asyncckpt.catalog.steps import StepRegistry
from asyncckpt.commit.in_flight import InFlight, InFlightSaves, Save
from asyncckpt.commit.pending import Overdue, PendingSave, SaveReport
from asyncckpt.commit.pruner import Pruner
from asyncckpt.commit.publication import verify_attempt
from asyncckpt.commit.room import make_room
from asyncckpt.errors import (
    ArenaBusy,
    CheckpointDamaged,
    DurabilityUnknown,
    PlanChanged,
    SaveAbandoned,
)
from asyncckpt.events import Busy, Committed, EventBus, Failed
from asyncckpt.memory.arena import Arena
from asyncckpt.protocols import Replaced, Store, renaming
from asyncckpt.stage.options import OnBusy, StagingOptions
from asyncckpt.storage.lease import HeldLease
from asyncckpt.write.options import WriterOptions
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.threads import WriterPool

log = logging.getLogger("asyncckpt")

#: A committer stuck in the kernel is given up so much later than the save's own deadline.
_GRACE_SECONDS = 10.0
#: How long a failed save's writes may stay in the kernel before their threads are given up.
_STUCK_SECONDS = 30.0


class Skipped(Exception):
    """A save is skipped, as ``on_busy="skip"`` asks. It never leaves ``Checkpointer.step``."""


class Committer:
    """Publishes saves in the order they were submitted, on a thread of its own. Thread-safe."""

    def __init__(
        self,
        store: Store,
        policies: Sequence[Policy],
        options: WriterOptions,
        events: EventBus,
        staging: StagingOptions,
        lease: HeldLease,
        quarantine: Quarantine,
        steps: StepRegistry,
        reuse: ReuseSource,
        saves: InFlightSaves,
    ) -> None:
        self._staging = staging
        self._store = store
        self._catalog = Catalog(store, store.address)
        self._options = options
        self._events = events
        self._lease = lease
        self._reuse = reuse
        self._saves = saves
        self._pool = WriterPool(1, "asyncckpt-committer")
        self._failed: list[PendingSave] = []
        #: Failed saves with a write that hangs. For the committer's thread.
        self._abandoned: list[Save] = []
        self._lock = threading.Lock()
        self._quarantine = quarantine
        self._steps = steps
        self._pruner = Pruner(store, self._catalog, policies, lease, quarantine, steps, events)
        #: Checkpoints that a durable one has replaced, but that somebody still reads.
        self._replaced: list[Replaced] = []
        #: Whether another rank of the job publishes and looks after the directory.
        self.is_follower = False
        #: Set where the ranks of a job must plan the next save anew.
        self.plan_changed = threading.Event()

    def submit(self, flight: InFlight) -> None:
        """Follow this save to its end. Never blocks."""
        self._saves.add(flight)
        self._pool.submit(lambda: self._commit(flight))

    def admit(self, step: int, nbytes: int, arena: Arena, policy: OnBusy, timeout: float) -> None:
        """Apply back-pressure to a save of ``nbytes`` that is due. Blocks under ``wait``.

        Raises ``Skipped`` or ``ArenaBusy`` where earlier saves hold the arena and the policy says so, and
        ``ArenaBusy`` after ``timeout`` seconds.
        """
        flights = self._saves.all()
        if not flights:
            return
        lacks_memory = arena.free_bytes() < min(nbytes, arena.budget_bytes)
        if len(flights) < self._staging.max_in_flight and not lacks_memory:
            return
        self._events.emit(Busy(step=step, policy=policy, in_flight=len(flights)))
        if policy == "skip":
            raise Skipped
        steps = ", ".join(str(flight.save.step) for flight in flights)
        if policy == "error":
            raise ArenaBusy(f"step {step}: earlier saves (steps {steps}) are not durable yet; save less often")
        # memory comes free extent by extent, so only the number of saves has to be waited for here
        if not self.wait_below(self._staging.max_in_flight, timeout):
            raise ArenaBusy(f"step {step}: earlier saves (steps {steps}) still not durable after {timeout:.0f} s")

    def wait_below(self, count: int, timeout: float | None) -> bool:
        """Block until fewer than ``count`` saves are in flight; False where ``timeout`` seconds passed first."""

        def below(seconds: float) -> bool:
            self.expire()
            return self._saves.wait_below(count, seconds)

        return interrupts.wait_for(below, timeout)

    def take_error(self) -> BaseException | None:
        """Return the oldest error of a failed save that nobody has seen yet, with the others as notes, or None. Each is
        handed out once."""
        if not self._failed:
            return None
        with self._lock:
            failed, self._failed = self._failed, []
            errors = [error for error in (pending.unobserved_error() for pending in failed) if error is not None]
        for error in errors[1:]:
            log.error("a further save failed too: %s", error)
            errors[0].add_note(f"asyncckpt: a further background save failed too: {error}")
        return errors[0] if errors else None

    def overdue(self, save: Save) -> Overdue:
        """Say when the save is given up although its committer reports nothing."""
        where = f"step {save.step}: storage under {self._store.address} hangs"
        return Overdue(
            scope=save.scope,
            at_seconds=save.started_seconds + self._options.durable_timeout_seconds + _GRACE_SECONDS,
            grace_seconds=_GRACE_SECONDS,
            error=SaveAbandoned(f"{where}; the save was given up, and nothing of it will be published"),
            unknown=DurabilityUnknown(
                f"{where} while the checkpoint gets its name: it is complete, and nobody can say whether it is visible "
                f"and durable. Look there once the storage answers, and save again"
            ),
        )

    def expire(self) -> None:
        """Give up saves whose committer hangs in the kernel, and replace its thread. On the main thread, signals wait
        until each is given up whole."""
        for flight in self._saves.all():
            overdue = self.overdue(flight.save)
            if time.perf_counter() <= overdue.at_seconds:
                continue
            with interrupts.deferred():
                error = overdue.give_up()
                if error is not None:
                    if isinstance(error, DurabilityUnknown):
                        self._quarantine.add(flight.save.contents.draft.name)
                    self._end(flight, error)
                    self._pool.replace_stuck(_GRACE_SECONDS)

    @property
    def has_error(self) -> bool:
        """Whether ``take_error`` may have something to hand out."""
        return bool(self._failed)

    def give_up_all(self, why: str) -> None:
        """Give up every save that is not visible yet. Does not block."""
        for flight in self._saves.all():
            error = SaveAbandoned(f"step {flight.save.step}: {why} before this save was durable, so it was given up")
            if flight.save.scope.give_up(error):
                self._end(flight, error)

    def close(self) -> None:
        """End the thread once it has done what was submitted. Does not wait."""
        if self._abandoned:
            self._pool.submit(lambda: self._discard(None, _STUCK_SECONDS))
        self._pool.close()

    def make_room(self, nbytes: int, step: int) -> None:
        """Make sure, before anything is written, that ``nbytes`` are free; if they are not, apply retention first.
        Blocks on the disk. Raises ``NotEnoughSpace``."""
        if self.is_follower:
            return
        reserved = sum(f.save.shards.unwritten_bytes() for f in self._saves.all() if f.save.step != step)
        make_room(self._store, nbytes, step, reserved, self.prune)

    def prune(self, *, dry_run: bool = False) -> list[CheckpointInfo]:
        """Apply the policies now; see ``Pruner.prune``."""
        return [] if self.is_follower else self._pruner.prune(dry_run=dry_run)

    def _commit(self, flight: InFlight) -> None:
        save = flight.save
        replaced: list[Replaced] = []
        error: BaseException | None = None
        began = time.perf_counter()
        try:
            read_back = verify_attempt if self._options.read_back else None
            save.descend_from(self._steps.parent_of(save.contents.draft.sequence))
            before = self._before_publish(save, replaced)
            written = save.commit(before, self._options.durable_timeout_seconds, read_back)
            now = time.perf_counter()
            report = SaveReport(
                step=save.step,
                path=f"{self._store.address}/{written.name}",
                nbytes=written.nbytes,
                written_bytes=save.written_bytes(written),
                stall_seconds=flight.job.stall_seconds,
                staged_seconds=flight.job.staged_seconds,
                durable_seconds=now - save.started_seconds,
                manifest_digest=written.file_digest,
            )
            self._events.emit(
                Committed(
                    step=save.step,
                    at_seconds=now,
                    path=report.path,
                    nbytes=report.nbytes,
                    written_bytes=report.written_bytes,
                    durable_seconds=report.durable_seconds,
                    stall_seconds=report.stall_seconds,
                    commit_seconds=now - max(began, save.written_seconds),
                    kind=save.contents.draft.kind,
                    metrics=save.contents.draft.metrics,
                    state_bytes=save.contents.layout.nbytes,
                )
            )
            with _logged(f"step {save.step} is durable, but the next save cannot build on it"):
                self._reuse.learn(written.kind, written.name, save.shards.files())
            flight.pending.resolve(report)
        except BaseException as caught:
            error = caught
            save.scope.fail(caught)
        with _logged(f"step {save.step}: closing the checkpoint before failed"):
            save.close()
        if error is None:
            self._quarantine.discard(written.name)  # where it hung so long that nobody knew whether it would come
            self._replaced += replaced
            self._catalog.trust(written.file_digest)
            self._after_commit(save, written.name)
        elif isinstance(error, DurabilityUnknown):  # the next run looks which of the two the disk has
            self._quarantine.add(save.contents.draft.name)
        else:
            self._put_back(replaced)
            if isinstance(error, CheckpointDamaged):  # the one before is damaged: write everything next time
                self._reuse.forget(save.contents.draft.kind)
        self._end(flight, error)
        self._discard(save if error is not None else None)

    def _discard(self, failed: Save | None, wait_seconds: float = 0.0) -> None:
        """Remove what is left of failed saves. Waits until the writes of ``failed`` have left the kernel, and replaces
        the threads of those that stay there: a file that hangs for good costs its save, and no other. For saves that
        hung before, waits ``wait_seconds``."""
        if failed is not None and not failed.discard(_STUCK_SECONDS):
            log.warning("step %d: a write of it hangs; its files go once it returns, or with the next run", failed.step)
            failed.shards.replace_stuck_threads(_STUCK_SECONDS)
            self._abandoned.append(failed)
        self._abandoned = [save for save in self._abandoned if not save.discard(wait_seconds)]

    def _before_publish(self, save: Save, replaced: list[Replaced]) -> Callable[[], None]:
        draft = save.contents.draft

        def check() -> None:
            self._lease.check()
            store = renaming(self._store)
            given_up = self._steps.replaced_by(draft.step, draft.kind, draft.sequence)
            if store is None:  # where they had this one's name, the attempt could not begin
                replaced.extend(Replaced(old, old, draft.attempt) for old in given_up)
                return
            for old in given_up:
                hidden = store.make_way(old, draft.attempt) if old not in self._quarantine else None
                if hidden is not None:
                    replaced.append(hidden)
                    self._catalog.forget(old)
            name = draft.name
            if name in self._quarantine or (save.contents.replace and self._catalog.must_be_kept(name)):
                with contextlib.suppress(FileNotFoundError):  # somebody has taken it away already
                    log.error("step %d: the damaged %s is kept as %s", save.step, name, store.set_aside(name))
                self._quarantine.discard(name)

        return check

    def _after_commit(self, save: Save, name: str) -> None:
        """Tidy up after a durable save. Nothing here can undo the acknowledgement: trouble is logged, and comes up
        again at the next save."""
        try:
            self._catalog.forget(name)
            draft = save.contents.draft
            self._steps.durable(save.step, draft.kind, draft.sequence, draft.attempt)
            if self.is_follower:
                return
            self._remove_replaced()
            if (store := renaming(self._store)) is not None:
                store.empty_trash()  # this save read the one that it has replaced
            if save.contents.draft.kind == "full":
                self._store.put(LATEST, f"{name}\n".encode(), replace=True)
            if self._pruner.policies:
                self.prune()
        except Exception as error:
            log.warning("step %d is durable, but tidying up after it failed: %s", save.step, error)

    def _put_back(self, replaced: Sequence[Replaced]) -> None:
        store = renaming(self._store)
        if store is not None:
            for one in replaced:
                store.put_back(one)

    def _remove_replaced(self) -> None:
        """Delete what the checkpoint that is durable now has replaced; what somebody still reads is deleted later."""
        kept: list[Replaced] = []
        for one in self._replaced:
            self._lease.check()
            with contextlib.suppress(FileNotFoundError):  # somebody has taken it away already
                if not self._store.remove(one.hidden):
                    kept.append(one)
        self._replaced = kept

    def _end(self, flight: InFlight, error: BaseException | None) -> None:
        if self._saves.begin_end(flight):
            flight.job.forget()
            if error is not None:
                draft = flight.save.contents.draft
                self._steps.release(draft.step, draft.kind, flight.claim)  # who is told next may save the step again
                if isinstance(error, PlanChanged):  # nothing is wrong: the next save makes up for it
                    self.plan_changed.set()
                flight.pending.reject(error)
                if not isinstance(error, PlanChanged):
                    with self._lock:
                        self._failed.append(flight.pending)
            self._saves.remove(flight)
            try:
                if error is not None:
                    self._events.emit(Failed(step=flight.save.step, error=error))
                flight.pending.announce()
            finally:
                self._saves.told(flight)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log what the body raises: the save that it follows is durable, and nobody may be told otherwise."""
    try:
        yield
    except Exception:
        log.exception("%s", what)
