"""The starter takes a save from the call to the background: planned, admitted, and copied as far as must be at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from asyncckpt.catalog.steps import StepRegistry, numbers
from asyncckpt.commit.committer import Committer, Skipped
from asyncckpt.commit.in_flight import InFlight
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import ArenaBusy, InvalidOption
from asyncckpt.events import EventBus, SaveStarted
from asyncckpt.loop.optimizer_hooks import WatchedOptimizers
from asyncckpt.plan.planned import Planned
from asyncckpt.ranks.coordinator import Coordinator
from asyncckpt.saver import SaveBuilder
from asyncckpt.scope import SaveScope
from asyncckpt.stage.checks import SnapshotChecks
from asyncckpt.stage.deferral import Deferral
from asyncckpt.stage.eager import Division, divide
from asyncckpt.stage.job import StagingJob
from asyncckpt.stage.options import OnBusy, StagingOptions
from asyncckpt.stage.samples import Sampler
from asyncckpt.stage.stager import Stager
from asyncckpt.stage.streams import CopyStreams, is_capturing


class SaveStarter:
    """Starts the saves of one checkpointer. For the training thread.

    ``options``: what a save does where earlier ones are still in flight, and how long it may wait.
    """

    def __init__(
        self,
        saves: SaveBuilder,
        committer: Committer,
        steps: StepRegistry,
        watched: WatchedOptimizers,
        options: StagingOptions,
        events: EventBus,
    ) -> None:
        self._builder = saves
        self._committer = committer
        self._steps = steps
        self._watched = watched
        self._options = options
        self._events = events
        self._streams = CopyStreams()
        self._deferral = Deferral(events)
        self._sampler = Sampler()
        self.stager = Stager()

    def start(
        self,
        coordinator: Coordinator | None,
        number: int,
        step: int,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None,
        kind: str,
        may_skip: bool,
        began: float,
    ) -> PendingSave:
        """Start a save, and return once training may go on. Blocks as ``Checkpointer.save`` does.

        ``number``: which of the job's calls this is. ``may_skip``: whether ``on_busy="skip"`` holds for this one.
        ``began``: when it was asked for, by ``time.perf_counter``. Raises ``Skipped``, and as ``Checkpointer.save``
        does; the step is free again then."""
        if is_capturing():
            raise InvalidOption(
                f"step {step}: save cannot be called while a CUDA graph is captured; call it afterwards"
            )
        values = numbers(metrics)
        claim = self._steps.reserve(step, kind, values)
        try:
            weights_only = kind == "weights"
            planned = self._builder.plan(
                coordinator, state, step, weights_only=weights_only, call=f"save/{number}", number=number
            )
            layout, pieces = planned.layout, planned.pieces
            self._builder.grow_arena(planned)
            policy: OnBusy = "wait" if self._options.on_busy == "skip" and not may_skip else self._options.on_busy
            self._admit(coordinator, step, sum(extent.nbytes for extent in layout.extents()), policy)
            save = self._builder.build(coordinator, planned, number, claim, kind, values, began)
            checks, division = self._divide(planned, save.scope)
            deferred = bool(division.deferred)
            self._events.emit(SaveStarted(step=step, at_seconds=began, nbytes=layout.nbytes, deferred=deferred))
            staging = StagingJob(
                save.scope,
                pieces,
                layout.extents(),
                self._builder.arena,
                self._streams,
                save.shards,
                self._events,
                began,
                save.digest if deferred else None,  # an eager save's copies must not wait for digests
                self._builder.splits,
                checks,
            )
        except BaseException:
            self._steps.release(step, kind, claim)
            raise
        pending = PendingSave(step, staging, self._committer.overdue(save))
        flight = InFlight(save, staging, pending, claim)
        deadline = time.monotonic() + self._options.stall_timeout_seconds
        try:
            if deferred:
                staging.stage_now(division.eager, deadline)
            else:
                self._submit(flight)
                staging.finish(deadline)
        finally:
            if deferred:  # last of all: a thread that wakes up takes the interpreter from this one
                self._submit(flight)
        staging.note_stall(began, "save")
        return pending

    def _divide(self, planned: Planned, scope: SaveScope) -> tuple[SnapshotChecks | None, Division]:
        """Decide what is copied when, and begin to check that it is right."""
        pieces = planned.pieces
        if not self._watched:
            return None, Division(set(range(len(pieces))), [], {})
        self._watched.training_waits()
        owned = self._watched.owned()
        keys = self._deferral.keys((planned.layout.fingerprint, len(pieces)), planned.components)
        division = divide(pieces, owned, self._deferral.earned(keys))
        checks = SnapshotChecks(scope, self._deferral, keys, pieces, division, owned, planned.layout, self._sampler)
        self._watched.check(checks)
        return checks, division

    def _submit(self, flight: InFlight) -> None:
        """Leave the rest of the save to background threads."""
        self._committer.submit(flight)
        self.stager.submit(flight.job)

    def _admit(self, coordinator: Coordinator | None, step: int, nbytes: int, policy: OnBusy) -> None:
        """Apply back-pressure. Where the policy is not to wait, a save that one rank cannot begin is begun by none."""
        arena = self._builder.arena
        if coordinator is None or policy == "wait":
            self._committer.admit(step, nbytes, arena, policy)
            return
        busy: BaseException | None = None
        try:
            self._committer.admit(step, nbytes, arena, policy)
        except (Skipped, ArenaBusy) as error:
            busy = error
        if coordinator.any_rank("busy", busy is not None):
            raise busy or (Skipped() if policy == "skip" else ArenaBusy(f"step {step}: busy on another rank"))
