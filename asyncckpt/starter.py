"""The starter takes a save from the call to the background: planned, admitted, and copied as far as must be at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch

from asyncckpt.assets import Assets
from asyncckpt.catalog.names import checked_names
from asyncckpt.catalog.step_number import step_number
from asyncckpt.catalog.steps import StepRegistry, numbers
from asyncckpt.commit.committer import Committer, Skipped
from asyncckpt.commit.in_flight import InFlight
from asyncckpt.commit.pending import PendingSave, failed
from asyncckpt.errors import ArenaBusy, InvalidOption, PlanChanged
from asyncckpt.events import EventBus, Failed, SaveStarted
from asyncckpt.loop.optimizer_hooks import WatchedOptimizers
from asyncckpt.memory import cuda
from asyncckpt.plan.planned import Planned
from asyncckpt.ranks.coordinator import Coordinator
from asyncckpt.saver import SaveBuilder
from asyncckpt.scope import SaveScope
from asyncckpt.stage.checks import SnapshotChecks
from asyncckpt.stage.deferral import Deferral
from asyncckpt.stage.device_job import DeviceJob
from asyncckpt.stage.device_snapshot import DeviceSnapshots
from asyncckpt.stage.eager import Divider, Division, divide
from asyncckpt.stage.job import StagingJob
from asyncckpt.stage.options import OnBusy, StagingOptions
from asyncckpt.stage.places import cuda_devices
from asyncckpt.stage.samples import Sampler
from asyncckpt.stage.stager import Stager
from asyncckpt.stage.streams import CopyStreams
from asyncckpt.types import pieces_of

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequest:
    """Says what is to be saved, as a call of ``Checkpointer`` asks for it. ``kind``: ``full`` or ``weights``.
    ``may_skip``: whether ``on_busy="skip"`` holds for this one. ``assets``, ``name``, ``again``: see
    ``Checkpointer.save``.
    ``patience``: how many seconds to wait for earlier saves, and for the copies, where that is less than the options
    say. ``began``: when it was asked for, by ``time.perf_counter``."""

    step: SupportsIndex
    state: Mapping[str, Any]
    metrics: Mapping[str, Any] | None = None
    kind: str = "full"
    may_skip: bool = False
    assets: Assets | None = None
    name: str | Sequence[str] | None = None
    again: bool = False
    patience: float | None = None
    began: float = field(default_factory=time.perf_counter)


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
        self.snapshots = DeviceSnapshots(options.snapshot, events)
        self._deferral = Deferral(events)
        self._sampler = Sampler()
        self._divider = Divider()
        self.stager = Stager()
        #: The components of which was said that they store nothing.
        self._told: set[str] = set()

    def begin(self, coordinator: Coordinator | None, request: SaveRequest) -> PendingSave:
        """Start a save, and return once training may go on. Blocks as ``Checkpointer.save`` does.

        A save for which the ranks have to plan anew is returned as one that failed: training goes on, here as on the
        others. Raises ``Skipped``, and as ``Checkpointer.save`` does; the other ranks
        are told, and the step is free again then."""
        step = request.step
        number = coordinator.next_save() if coordinator is not None else 0
        try:
            if cuda.is_capturing():
                raise InvalidOption(
                    f"step {step}: save cannot be called while a CUDA graph is captured; call it afterwards"
                )
            # these two read tensors, which would end a capture
            number_of_step, values = step_number(step), numbers(request.metrics)
            with cuda.beside_captures():  # another thread may be capturing
                return self._start(coordinator, number, number_of_step, values, request)
        except Skipped:
            raise
        except PlanChanged as error:
            self._committer.plan_changed.set()
            self._events.emit(Failed(step=step_number(step), error=error))
            return failed(step_number(step), error)
        except BaseException as error:
            if coordinator is not None:
                coordinator.give_up(number, error)
            raise

    def _start(
        self, coordinator: Coordinator | None, number: int, step: int, values: dict[str, float], request: SaveRequest
    ) -> PendingSave:
        """Do what ``begin`` says; ``number``: which of the job's calls this is. ``step`` and ``values``: the request's
        as numbers. Where it raises, the step is free."""
        state, kind, began = request.state, request.kind, request.began
        longest = self._options.stall_timeout_seconds
        patience = longest if request.patience is None else min(request.patience, longest)
        claim = self._steps.reserve(step, kind, values, checked_names(request.name), again=request.again)
        try:
            beside = self._builder.assets_of(coordinator, state, request.assets)
            weights_only = kind == "weights"
            planned = self._builder.plan(
                coordinator, state, step, weights_only=weights_only, call=f"save/{number}", number=number
            )
            layout, pieces = planned.layout, planned.pieces
            self._tell_of_nothing(state, planned)
            self._builder.grow_arena(coordinator, planned)
            policy = self._options.on_busy if request.may_skip or self._options.on_busy != "skip" else "wait"
            devices = _devices(planned)
            image = self.snapshots.begin(step, layout, devices, _vouched(planned))
            self._admit(coordinator, step, sum(extent.nbytes for extent in layout.extents()), policy, patience)
            save = self._builder.build(coordinator, planned, number, claim, kind, values, beside, began)
            checks, division = self._divide(planned, save.scope, devices, apart=image is not None)
            deferred = bool(division.deferred)
            self._events.emit(SaveStarted(step=step, at_seconds=began, nbytes=layout.nbytes, deferred=deferred))
            tensors = pieces_of(pieces).tensors  # small ones may have been cloned since
            staging: StagingJob
            arena, events = self._builder.arena, self._events
            if image is not None:
                staging = DeviceJob(
                    image, self.snapshots.landing, save.scope, tensors, layout, arena, save.shards, events, began
                )
            else:
                streams, splits = self._streams.of(devices), self._builder.splits
                staging = StagingJob(
                    save.scope, tensors, layout, arena, streams, save.shards, events, began, splits, checks
                )
        except BaseException:
            self._steps.release(step, kind, claim)
            raise
        pending = PendingSave(step, self._events.notifier, staging, self._committer.overdue(save))
        flight = InFlight(save, staging, pending, claim)
        deadline = time.monotonic() + patience
        try:
            if isinstance(staging, DeviceJob):
                staging.take_snapshot(deadline)
            elif deferred:
                staging.stage_now(division.eager, deadline)
            else:
                self._submit(flight)
                staging.finish(deadline)
        finally:
            if deferred or staging.is_apart:  # last of all: a thread that wakes up takes the interpreter from this one
                self._submit(flight)
        staging.note_stall(began, "save")
        return pending

    def _divide(
        self, planned: Planned, scope: SaveScope, devices: Collection[torch.device], *, apart: bool
    ) -> tuple[SnapshotChecks | None, Division]:
        """Decide what is copied when, and begin to check that it is right. ``devices``: the CUDA devices that pieces
        lie on. ``apart``: all is copied on the device right now, so that nothing has to be checked."""
        pieces = planned.pieces
        if self._watched:
            self._watched.training_waits()
            self._watched.tell_of_unused_gradients(scope.step)
        if apart or not self._watched:
            return None, Division(set(range(len(pieces))), [], {})
        known, again = planned.known, planned.again
        owned = self._watched.owned(known, again)
        keys = self._deferral.keys((planned.layout.fingerprint, len(pieces)), planned.components)
        division = divide(pieces, owned, self._deferral.earned(keys), self._divider, _vouched(planned))
        checks = SnapshotChecks(
            *(scope, self._deferral, keys, pieces, division, owned, planned.layout, self._sampler, bool(devices)),
            known=known,
            again=again,
        )
        self._watched.check(checks)
        return checks, division

    def _tell_of_nothing(self, state: Mapping[str, Any], planned: Planned) -> None:
        """Log, once, which modules have nothing that is stored: they come back as they are made."""
        stored = {shard.component for shard in planned.layout.shards}
        for component in planned.components:
            name, module = component.name, state.get(component.name)
            empty = component.kind == "module" and not component.pieces and not component.tree and name not in stored
            if not empty or name in self._told or not isinstance(module, torch.nn.Module):
                continue
            self._told.add(name)
            lost = [found for found, _ in module.named_buffers()][:8]
            why = f"; its buffers {', '.join(lost)} are not persistent" if lost else ""
            log.warning(
                "component %r has nothing to store%s: its state_dict is empty, so a resumed run gets it as it is made. "
                "Register what is to come back as persistent, or leave the component out",
                name,
                why,
            )

    def _submit(self, flight: InFlight) -> None:
        """Leave the rest of the save to background threads."""
        self._committer.submit(flight)
        self.stager.submit(flight.job)

    def _admit(self, coordinator: Coordinator | None, step: int, nbytes: int, policy: OnBusy, patience: float) -> None:
        """Apply back-pressure. Where the policy is not to wait, a save that one rank cannot begin is begun by none."""
        arena = self._builder.arena
        if coordinator is None or policy == "wait":
            self._committer.admit(step, nbytes, arena, policy, patience)
            return
        busy: BaseException | None = None
        try:
            self._committer.admit(step, nbytes, arena, policy, patience)
        except (Skipped, ArenaBusy) as error:
            busy = error
        if coordinator.any_rank("busy", busy is not None):
            raise busy or (Skipped() if policy == "skip" else ArenaBusy(f"step {step}: busy on another rank"))


def _vouched(planned: Planned) -> object:
    """Return the same object as long as the pieces are found to be and to lie as they did; None where nobody knows."""
    return planned.known if planned.again is None or planned.again.is_same else None


def _devices(planned: Planned) -> Collection[torch.device]:
    """Return the CUDA devices that the pieces of a save lie on."""
    known, again = planned.known, planned.again
    if known is None or (again is not None and not again.is_same):
        return cuda_devices(pieces_of(planned.pieces).tensors)
    if "devices" not in known.cache:
        known.cache["devices"] = cuda_devices(pieces_of(planned.pieces).tensors)
    found: set[torch.device] = known.cache["devices"]
    return found
