"""The pruner deletes the checkpoints that no policy keeps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.catalog.retention import Policy, plan, plan_thinning, unreported
from asyncckpt.catalog.steps import StepRegistry
from asyncckpt.commit.thinner import THIN, thin
from asyncckpt.errors import AsyncCkptError, LeaseLost, UnsupportedValue
from asyncckpt.events import EventBus, Pruned, ThinnedOut
from asyncckpt.protocols import Store
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.storage.lease import HeldLease

log = logging.getLogger("asyncckpt")

#: Names of checkpoints that are there and not listed begin so: see ``storage.local``.
_HIDDEN = (".damaged-", ".replaced-")


class Pruner:
    """Applies the retention policies of one run, which it holds. Thread-safe."""

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        policies: Sequence[Policy],
        lease: HeldLease,
        quarantine: Quarantine,
        steps: StepRegistry,
        events: EventBus,
    ) -> None:
        self.policies = tuple(policies)
        self._store = store
        self._catalog = catalog
        self._lease = lease
        self._quarantine = quarantine
        self._steps = steps
        self._events = events
        self._lock = threading.Lock()
        #: The attempts that cannot be thinned out.
        self._whole: set[str] = set()
        #: The metrics of which was said that no checkpoint has them.
        self._told: set[str] = set()

    def prune(self, *, dry_run: bool = False) -> list[CheckpointInfo]:
        """Apply the policies now; return what was deleted (or would be). Unusable checkpoints are evidence and stay.
        Blocks on the disk. Raises ``LeaseLost``."""
        with self._lock:
            seen, own, to_delete = self._plan()
            self._tell_unreported(own)
            if dry_run:
                return to_delete
            deleted: list[CheckpointInfo] = []
            for entry in to_delete:
                self._lease.check()
                if self._catalog.marks() != seen:  # somebody has pinned or annotated a checkpoint since the plan
                    seen, _, still = self._plan()
                    if entry.name not in {one.name for one in still}:
                        continue
                if self._store.remove(entry.name):
                    deleted.append(entry)
                    self._catalog.forget(entry.name)
                    self._steps.deleted(entry.step, entry.kind, entry.name)
                self._events.emit(Pruned(step=entry.step, name=entry.name, deleted=entry in deleted))
            thinned = self._thin_out()
            self._clear_annotations([*deleted, *thinned])
            return deleted

    def _thin_out(self) -> list[CheckpointInfo]:
        """Leave the weights alone of what only policies with ``weights_only`` keep; return what was replaced so. What
        cannot be thinned out stays whole."""
        if not any(getattr(policy, "weights_only", False) for policy in self.policies):
            return []
        seen, own, _ = self._plan()
        gone: list[CheckpointInfo] = []
        for entry in plan_thinning(own, self.policies):
            if entry.annotation_problem is not None or entry.attempt in self._whole:
                continue
            self._lease.check()
            try:
                if self._thin(entry, own, seen):
                    gone.append(entry)
            except LeaseLost:
                raise
            except (AsyncCkptError, OSError) as error:
                if isinstance(error, UnsupportedValue):
                    self._whole.add(entry.attempt)
                log.warning("%s is kept whole: %s", entry.path, error)
        return gone

    def _thin(self, entry: CheckpointInfo, own: Sequence[CheckpointInfo], seen: object) -> bool:
        """Thin one checkpoint out, unless somebody reads it. One of which the weights are there already, as after a
        process that ended in between, is only deleted."""
        twin = next((one for one in own if one.derived == THIN and one.attempt == entry.attempt), None)
        if twin is None:
            with open_checkpoint(self._store.open(entry.name)) as checkpoint:
                made = thin(self._store, checkpoint, self._store.names(), self._lease.check)
            left, freed_bytes = made.name, made.freed_bytes
        else:
            left, freed_bytes = twin.name, entry.nbytes - twin.nbytes
        # somebody may have pinned it, or given it metrics, since the plan: both stay then, and the next plan decides
        if self._catalog.marks() != seen or not self._store.remove(entry.name):
            return False
        self._catalog.forget(entry.name)
        self._steps.thinned(entry.step, entry.name, left, entry.sequence, entry.names)
        self._events.emit(ThinnedOut(step=entry.step, name=entry.name, left=left, freed_bytes=freed_bytes))
        return True

    def _plan(self) -> tuple[object, list[CheckpointInfo], list[CheckpointInfo]]:
        """Return the marks that the plan rests on, the usable checkpoints that this run made itself, and those of them
        to delete."""
        seen = self._catalog.marks()  # before the checkpoints: what is added meanwhile makes another plan, later
        entries = self._catalog.entries(fresh=False)
        own = [e for e in entries if e.damage is None and not e.renamed and e.name not in self._quarantine]
        # nobody knows how good a checkpoint is whose annotations cannot be read
        return seen, own, [entry for entry in plan(own, self.policies) if entry.annotation_problem is None]

    def _clear_annotations(self, deleted: Sequence[CheckpointInfo]) -> None:
        """Delete the annotations of attempts that are gone: of what was deleted, and of what another save has replaced.
        Trouble is logged: they are a few bytes that nobody reads."""
        try:
            annotated = set(self._catalog.annotations.keys())
            if not annotated:
                return
            rows = self._catalog.entries(fresh=False)
            orphans = annotated - {row.attempt for row in rows}
            gone = orphans & {entry.attempt for entry in deleted}
            # what cannot be read, or was set aside, may be the attempt that an annotation belongs to
            hidden = any(name.startswith(_HIDDEN) for name in self._store.listing(""))
            if orphans - gone and all(row.attempt for row in rows) and not hidden:
                there = Catalog(self._store, self._store.address).entries()
                if all(row.attempt for row in there):
                    gone |= orphans - {row.attempt for row in there}
            if gone:
                self._catalog.annotations.remove(gone)
        except (AsyncCkptError, OSError) as error:
            log.warning("%s: annotations of deleted checkpoints are left: %s", self._store.address, error)

    def _tell_unreported(self, own: Sequence[CheckpointInfo]) -> None:
        for metric in unreported(own, self.policies):
            if metric not in self._told:
                self._told.add(metric)
                known = ", ".join(sorted({name for entry in own for name in entry.metrics})) or "none"
                log.warning(
                    "KeepBest(%r): no checkpoint in %s has that metric, so all are kept; metrics there: %s. Report it "
                    "with save(..., metrics={%r: …}), or later with Run.annotate(step, {%r: …})",
                    metric,
                    self._store.address,
                    known,
                    metric,
                    metric,
                )
