"""``Checkpointer`` is what a training loop calls. It knows nothing of bytes or files."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, SupportsIndex

import torch

from asyncckpt import forks, interrupts
from asyncckpt.assets import Assets, read_assets
from asyncckpt.catalog import names, retention
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.step_number import step_number
from asyncckpt.catalog.steps import StepRegistry
from asyncckpt.commit.committer import Committer, Skipped
from asyncckpt.commit.in_flight import InFlightSaves
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import ArenaBusy, CheckpointNotFound, InvalidOption, PlanChanged, storage_errors
from asyncckpt.events import EventBus, Preempting, Subscriber, subscribers_of
from asyncckpt.formats.options import Files, FilesName, Safetensors, files_of
from asyncckpt.loop import cadence
from asyncckpt.loop.at_exit import drain_at_exit
from asyncckpt.loop.calls import TrainingCalls
from asyncckpt.loop.optimizer_hooks import WatchedOptimizers
from asyncckpt.loop.preemption import Preempted, Preemption, SignalWatch
from asyncckpt.loop.triggers import SaveTriggers
from asyncckpt.ownership import RunOptions, RunOwnership, check_kinds, check_kinds_or_none
from asyncckpt.ranks.coordinator import Known
from asyncckpt.ranks.store import RankOptions
from asyncckpt.restore.restore import RestoreReport
from asyncckpt.saver import SaveBuilder
from asyncckpt.stage.options import StagingOptions
from asyncckpt.starter import SaveRequest, SaveStarter
from asyncckpt.state.dtensor import job_rank
from asyncckpt.write.options import WriterOptions
from asyncckpt.write.reuse import ReuseSource

log = logging.getLogger("asyncckpt")

_SAFETENSORS, _STAGING, _WRITER = Safetensors(), StagingOptions(), WriterOptions()
_RANKS, _RUN = RankOptions(), RunOptions()


class Checkpointer(RunOwnership):
    """Saves and restores the training state of one run in one directory.

    ``path``: the run directory, made if only its last part is missing.
    ``every``: when ``step`` saves: an int (steps), ``Steps``, ``Minutes``, ``Milestones``, several in a list, or None.
    ``keep``: which checkpoints stay: all that ``KeepLast`` or another policy names; without a policy, every one.
    ``preemption``: save on SIGTERM and such, then leave.
    ``on_event``: called with every event, on a thread of its own: see ``asyncckpt.events``.
    ``config``: plain values that every manifest records.
    ``assets``: small files for every checkpoint, read now: a dict or list of paths, bytes, and objects with
    ``save_pretrained``, such as a model's config and its tokenizer (docs/assets.md).
    ``files``: what checkpoints are made of: ``Safetensors(...)`` (default), ``Zarr(...)``, or one of their names.
    ``staging``, ``writer``: how the state is copied, and how it is written.
    ``ranks``: how the ranks of a job deal with each other; None: this process is alone, whatever
    ``torch.distributed`` says.
    ``run``: names, and how the directory is taken.

    Where ``torch.distributed`` is initialised, all its ranks write each checkpoint together: every rank makes the same
    checkpointer and the same calls (docs/parallelism.md). A call that needs the others waits for each of their answers
    at most ``RankOptions.timeout_seconds``, then raises ``RankLost``.

    Call ``step``, ``save``, ``prepare``, ``watch``, ``guard``, ``resume`` and ``restore`` from the training thread, or
    from a callback where the state does not change meanwhile; everything else from any thread. Signals that come
    during a call are acted on when it waits or ends. Errors of background saves are raised by the next ``step``,
    ``save``, ``wait`` or ``close``, unless the ``PendingSave`` delivered them already. After ``close`` and in a forked
    child, ``step``, ``save`` and ``wait`` raise ``CheckpointerClosed``. The first ``step``, ``save``, ``prepare``,
    ``resume`` or ``prune`` opens the run: before it nothing is written, and no lease is needed. One that the same
    thread has opened there before, outside ``with``, is closed then. Raises ``InvalidOption``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: cadence.Every = None,
        keep: retention.Policy | Sequence[retention.Policy] = (),
        preemption: Preemption | None = None,
        on_event: Subscriber | Sequence[Subscriber] = (),
        config: Any = None,
        assets: Assets = (),
        files: Files | FilesName = _SAFETENSORS,
        staging: StagingOptions = _STAGING,
        writer: WriterOptions = _WRITER,
        ranks: RankOptions | None = _RANKS,
        run: RunOptions = _RUN,
    ) -> None:
        check_kinds(staging=(staging, StagingOptions), writer=(writer, WriterOptions), run=(run, RunOptions))
        check_kinds_or_none(ranks=(ranks, RankOptions), preemption=(preemption, Preemption))
        common = read_assets(assets, writer.asset_bytes) if ranks is None or job_rank() == 0 else {}
        files = files_of(files)
        if files.chain and not writer.reuse_unchanged:
            raise InvalidOption("Safetensors(delta=…) builds on the checkpoint before: it needs reuse_unchanged=True")
        layout = files.layout(staging.budget_bytes)
        super().__init__(
            path,
            direct=writer.direct,
            events=EventBus(subscribers_of(on_event)),
            options=run,
            ranks=ranks,
            files=files,
            layout=layout,
            patience_seconds=staging.stall_timeout_seconds,
        )
        self._steps = StepRegistry(self.path, names.NameTemplate(run.name), self._quarantine, overwrite=run.overwrite)
        self._reuse = ReuseSource(self._store, self._quarantine)
        self._in_flight = InFlightSaves()
        self._committer = Committer(
            self._store,
            retention.checked_policies(keep),
            writer,
            self.events,
            staging,
            self._held,
            self._quarantine,
            self._steps,
            self._reuse,
            self._in_flight,
        )
        self._watched = WatchedOptimizers(self._in_flight, staging.stall_timeout_seconds)
        self._triggers = SaveTriggers(every, preemption)
        self._builder = SaveBuilder(
            files=files,
            layout=layout,
            writer=writer,
            budget_bytes=staging.budget_bytes,
            check_replicas=ranks is not None and ranks.check_replicas,
            config=config,
            assets=common,
            replace=run.overwrite,
            store=self._store,
            events=self.events,
            committer=self._committer,
            reuse=self._reuse,
            lease=self._held,
            quarantine=self._quarantine,
            steps=self._steps,
        )
        self._arena = self._builder.arena
        self._starter = SaveStarter(self._builder, self._committer, self._steps, self._watched, staging, self.events)
        self._preparations = 0
        self._calls = TrainingCalls(self.path, staging.stall_timeout_seconds)
        self._callback_seconds = writer.durable_timeout_seconds
        drain_at_exit(self)
        # saves in flight hold the checkpointer; once nothing does, its threads have nothing left to do
        threads = (self._starter.stager, self._starter.snapshots, self._builder, self._committer, self.events.notifier)
        self._threads: tuple[forks.Closable, ...] = threads if self._journal is None else (*threads, self._journal)
        forks.finalize(self, forks.close_all, *self._threads)

    # -- saving ------------------------------------------------------------------------------------------------------

    def step(
        self,
        step: SupportsIndex,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        assets: Assets | None = None,
    ) -> PendingSave | None:
        """Call once a training step, after the update: saves when a save is due and returns its ``PendingSave``.

        ``step`` is any whole number, one of NumPy or in a tensor too. Returns None in microseconds where none is due.
        ``metrics``, ``assets``: see ``save``.
        In a job with ``preemption``, or with a cadence that looks at a clock (``Minutes``), each step asks the job's
        store: a message, or at most a second where the store has stopped.
        The first call does what ``prepare`` does. Blocks and raises as ``save`` does, but returns None where
        ``on_busy="skip"`` skips. After a preemption signal it saves, waits until that is durable, for at most
        ``Preemption.deadline_seconds``, closes, and raises ``Preempted`` (a ``SystemExit``).
        """
        self._surface()
        step = step_number(step)
        if not self._preparations:
            self.prepare(state)
        signals = self._triggers.preempted(step, self._coordinator)
        if signals is not None:
            self._leave(step, SaveRequest(step=step, state=state, metrics=metrics, assets=assets), signals)
        if not self._triggers.due(step, self._steps.last(), self._coordinator):
            return None
        try:
            return self._save(SaveRequest(step=step, state=state, metrics=metrics, may_skip=True, assets=assets))
        except Skipped:
            return None

    def save(
        self,
        step: SupportsIndex,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None = None,
        weights_only: bool = False,
        assets: Assets | None = None,
        name: str | Sequence[str] | None = None,
        again: bool = False,
    ) -> PendingSave:
        """Save now. Returns once training may go on; the checkpoint becomes durable in the background.

        Blocks until the state is copied, but not for what a watched optimizer owns; after
        ``StagingOptions.stall_timeout_seconds`` the save fails instead. First waits as long for earlier saves (see
        ``on_busy``; ``ArenaBusy``), and in a job, where names or shapes are new, for the other ranks. ``metrics``:
        numbers; a tensor among them is read here, which waits for its device. ``weights_only`` saves the modules
        alone, as a checkpoint of kind ``weights`` that ``resume`` does not look at. ``assets``: files for this
        checkpoint, beside those given to the constructor and in the place of those of the same name; they are read
        here. ``name``: one or several of your own, which mean this checkpoint until a later save has them
        (docs/assets.md); with one, a step may be saved more than once. ``again``: the step that was saved last may be
        saved once more; its checkpoint, or its save that is in flight, makes way once this one is durable. Raises
        ``UnsupportedValue``, ``InvalidStep``, ``InvalidOption``, ``StepExists``, what ``prepare`` raises, and the error
        of an earlier save.
        """
        self._surface()
        kind = "weights" if weights_only else "full"
        return self._save(
            SaveRequest(step=step, state=state, metrics=metrics, kind=kind, assets=assets, name=name, again=again)
        )

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Open the run, plan the layout, and have memory faulted in in the background, so that the first save is as
        fast as the others; ``step`` and ``resume`` do it by themselves. Takes the lease: blocks for the storage, at
        most ``StagingOptions.stall_timeout_seconds``, and in a job for the other ranks. Raises ``RunLocked``,
        ``RunPathError``, ``StorageFailed``, ``SaveAbandoned`` (the storage does not answer), ``RankLost``,
        ``RanksDisagree``, ``UnsupportedValue``, ``NotEnoughMemory``."""
        self._check_usable()
        with self._calls.one():
            self._open()
            planned = self._builder.plan(
                self._coordinator, state, 0, weights_only=False, call=f"prepare/{self._preparations}"
            )
            self._builder.grow_arena(self._coordinator, planned)
            self._preparations += 1

    def watch(self, *optimizers: torch.optim.Optimizer) -> None:
        """Let snapshots overlap forward and backward: ``save`` returns at once, and the trained parameters and the
        state of these optimizers are copied in the background. The next ``step`` of an optimizer over them waits for
        what is not copied yet. Never blocks.

        A tensor is deferred once a step has found it as it was at ``save``: the first save, and the first with new
        tensors, copies before it returns. Change parameters in no other way between ``save`` and ``step``, or do so
        inside ``guard()``. A tensor that is changed so is copied before ``save`` returns from then on
        (``CopiedEagerly``); where its copy was not made yet, that save fails with ``ChangedWhileCopied``.

        A wrapper such as Accelerate's is followed to the optimizer that it wraps. Raises ``InvalidOption`` where that
        one cannot be found, and for anything but an optimizer; then none of them is watched."""
        self._check_process()
        self._watched.add(*optimizers)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Wrap in-place changes of watched parameters outside ``optimizer.step`` (EMA swaps, weight clipping, a
        ``load_state_dict``) in this: it waits until no copy of them is pending, then runs the body. A save whose copy
        takes longer than ``StagingOptions.stall_timeout_seconds`` fails instead."""
        with interrupts.deferred():
            self._watched.before_change("guard")
        yield

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every save has ended; False where ``timeout`` seconds passed first. Callbacks and subscribers may
        still be told of it then: ``close`` waits for them. Raises background errors."""
        self._check_usable()
        with interrupts.deferred():
            drained = self._committer.wait_below(1, timeout)
        self._surface()
        return drained

    def prune(self, *, dry_run: bool = False) -> list[CheckpointInfo]:
        """Apply the retention policies now; return the checkpoints deleted (or that would be). Blocks on the disk. In a
        job, first call ``prepare``: then only rank 0 prunes. Raises ``LeaseLost``, and as ``prepare`` does."""
        self._check_process()
        with contextlib.nullcontext() if dry_run else self._calls.one(), storage_errors(self.path):
            if not dry_run:
                self._open()
            return self._committer.prune(dry_run=dry_run)

    def resume(self, state: Mapping[str, Any]) -> int:
        """Restore the newest full checkpoint that verifies and return its step; 0 where there is none at all.

        Blocks for the whole read, in a job together with the other ranks. A damaged checkpoint is reported
        (``FellBack``, a warning) and the one before is used. A warning names the versions that were others when it was
        saved: training may then go on with other bits. Raises ``NoUsableCheckpoint`` where checkpoints exist and
        none can be used (training never starts from scratch in silence), and as ``restore`` and ``prepare`` do.
        """
        self._check_usable()
        with self._calls.one():
            self._open(to_restore=True)
        try:
            report = self.restore(state)
        except CheckpointNotFound:
            self.prepare(state)
            return 0
        finally:
            self._close_found()
        if report.changed:
            log.warning("resumed step %d, which was saved with %s", report.step, ", ".join(report.changed))
        self._steps.rewind_to(report.step, report.attempt)
        self.prepare(state)
        return report.step

    def _learn(self, found: list[Known]) -> None:
        self._committer.is_follower = self._coordinator is not None and not self._coordinator.leads
        if not self._committer.is_follower:
            self.events.note = self._journal
        for known in found:
            if known.renamed:
                self._steps.add_foreign(known.step, known.name)
                continue
            if known.damaged:
                self._quarantine.add(known.name)
            else:
                self._reuse.learn(known.kind, known.name)
            self._steps.add(known.step, known.kind, known.name, known.sequence, known.names)
        self._steps.opened()

    def _before_restore(self) -> None:
        self._watched.before_change("guard")
        super()._before_restore()

    def _after_restore(self, report: RestoreReport) -> None:
        if report.whole:  # a part of a state, or weights alone, sends training nowhere
            self._steps.rewind_to(report.step, report.attempt)

    @property
    def preempting(self) -> bool:
        """Whether a preemption signal has come to this process: the next steps save and leave. Ask where no step comes
        for long, in an evaluation say, and break off. Never blocks; other ranks may not have been signalled."""
        return self._triggers.signals is not None and self._triggers.signals.received is not None

    def unfinished(self) -> int:
        """Count the saves that have not ended; 0 after ``close`` and in a forked child. Never blocks."""
        return len(self._in_flight.all()) if os.getpid() == self._pid and not self._closed else 0

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait until a call that runs on another thread has returned, every save is durable or given up, and callbacks
        and subscribers have been told, each for ``WriterOptions.durable_timeout_seconds`` at most. Then give the
        directory back, and raise the error of a save that failed. A warning says which last steps were not saved, where
        ``every`` is given. Idempotent; does nothing in a forked child, and, in a callback, where another thread closes
        already."""
        if os.getpid() != self._pid:
            return
        self._triggers.tell_of_unsaved(self.path, self._steps.last())
        self._end(None)
        error = self._committer.take_error()
        if error is not None:
            raise error

    def _end(self, timeout: float | None) -> None:
        try:
            self._finish(timeout)
        finally:  # where signals are not deferred any more: while they are, the handlers are not ours to put back
            self._triggers.close()

    def _finish(self, timeout: float | None) -> None:
        with self._calls.ending(at_once=self.events.notifier.on_own_thread()) as ours:
            if not ours or self._closed:
                return
            try:
                if not self._committer.wait_below(1, timeout):
                    self._committer.give_up_all(f"{self.path} was closed")
                patience = self._callback_seconds if timeout is None else max(1.0, timeout)
                interrupts.wait_for(self._in_flight.wait_told, patience)  # what is not posted yet cannot be waited for
                self.events.notifier.drain(patience)
            finally:
                self._closed = True
                self._watched.close()
                forks.close_all(*self._threads)
                self._arena.close()
                self._release()

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._triggers.forget_last_step()
        try:  # what the body raised must not be hidden by what a save raised: that goes along as a note
            self.close()
        except Exception as background:
            error.add_note(f"asyncckpt: a background save failed too: {background}")

    def _save(self, request: SaveRequest) -> PendingSave:
        with self._calls.one():
            self._open()
            pending = self._starter.begin(self._coordinator, request)
            if not isinstance(pending.failure(), PlanChanged):
                self._triggers.saved()
            return pending

    def _leave(self, step: int, request: SaveRequest, signals: SignalWatch) -> None:
        deadline, left = signals.preemption.deadline_seconds, signals.remaining_seconds
        self.events.emit(Preempting(step=step, signal=signals.name, deadline_seconds=deadline))
        durable = True
        try:
            if not self._steps.has(step):
                pending = self._save(replace(request, patience=left()))
                pending.result(left())
            elif not self._committer.wait_below(1, left()):
                raise TimeoutError(f"step {step}")
        except (TimeoutError, ArenaBusy):
            if left() > 0:  # it is not the deadline that ended this
                raise
            durable = False
            signals.tell_of_lost(step, self.path)
        self._end(max(1.0, left()) if durable else 0.0)  # what tidies up after a durable save may hang, too
        raise Preempted(signals.exit_code(), step, durable=durable)

    def _surface(self) -> None:
        self._check_usable()
        self._committer.expire()
        with interrupts.deferred() if self._committer.has_error else contextlib.nullcontext():
            error = self._committer.take_error()
        if error is not None:
            raise error
