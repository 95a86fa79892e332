"""What ``Run`` does to restore: it chooses a checkpoint, and goes on to an older one where the newest is damaged."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.chosen import LOOKS, is_gone, of_its_name
from asyncckpt.catalog.listing import CheckpointInfo, Listing, newest_of
from asyncckpt.catalog.newest import tell_of_missing
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    NoUsableCheckpoint,
    SaveFailed,
    storage_errors,
)
from asyncckpt.events import EventBus, FellBack, RanksChanged, Restored
from asyncckpt.protocols import Store
from asyncckpt.restore.changes import Changes

# restore/ imports torch, which those who only look at a run do not wait for: the methods import it
if TYPE_CHECKING:
    import torch

    from asyncckpt.restore.carrying_out import Stages
    from asyncckpt.restore.restore import Rename, RestoreReport

log = logging.getLogger("asyncckpt")


class RestoresState:
    """Restores live state from the checkpoints of a run. ``Run`` is the class that people use."""

    path: str
    events: EventBus
    _store: Store
    #: Names of the checkpoints whose files were found damaged.
    _quarantine: Quarantine

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | str | None = None,
        *,
        strict: bool = True,
        include: str | Sequence[str] | None = None,
        rename: Rename | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expect_digest: str | None = None,
    ) -> RestoreReport:
        """Restore the components in ``state``, in place, from checkpoint ``step`` (default: the newest full one that
        verifies).

        Blocks for the whole read. Nobody else may use ``state`` meanwhile; in a job, all ranks make this call.
        Reads only the extents those components need, and verifies every byte before it is used. ``include``:
        qualified-name prefixes (``model.encoder.``) to restore; modules by tensor, other components whole.
        ``rename``: maps stored names or prefixes of them to live ones, or a function (None drops a tensor).
        ``dtype``: a live floating tensor of this dtype takes any stored floating dtype. ``device``: where tensors
        that do not live yet are made (modules on the meta device are materialised there).
        ``expect_digest``: the ``sha256:…`` of the manifest's file, known from elsewhere
        (``SaveReport.manifest_digest``, ``asyncckpt show``). Nothing of another manifest is used: it raises
        ``DigestMismatch``, and no older checkpoint is tried. It binds the data as far as the checkpoint's own digests
        do: save with ``digest="blake3"`` or ``"sha256"``.

        Raises ``StateMismatch`` listing all missing, unexpected and mismatched names, before anything is changed;
        ``strict=False`` leaves them as they are and reports them. Raises ``StateMismatch`` too where an object refuses
        its values, ``CheckpointNotFound``, ``CheckpointDamaged`` on bad bytes, ``NoUsableCheckpoint`` where checkpoints
        exist and none can be restored, ``RestoreFailed``, ``NotEnoughMemory``, ``VersionUnsupported``,
        ``InvalidOption`` and, in a job, ``RankLost``. Every error says in ``overwritten`` which components have
        changed, wholly or in part, and in ``untouched`` which have not.
        """
        began = time.perf_counter()
        self._before_restore()
        options = {"strict": strict, "include": include, "rename": rename, "device": device, "dtype": dtype}
        changes = Changes()
        changes.expect(state if isinstance(state, Mapping) else ())
        with changes.told(), storage_errors(self.path):
            if step is None and expect_digest is None:
                report = self._restore_newest(state, options, changes)
            else:
                options["expect_digest"] = expect_digest
                report = self._restore_chosen(step, state, options, changes)
        report = replaced(report, find_seconds=max(0.0, time.perf_counter() - began - report.seconds))
        self._after_restore(report)
        return report

    def _restore_chosen(
        self, step: int | str | None, state: Mapping[str, Any], options: Mapping[str, Any], changes: Changes
    ) -> RestoreReport:
        """Restore the checkpoint of that step, or the newest full one, and no other."""
        with contextlib.ExitStack() as open_until_restored:
            listing = open_until_restored.enter_context(self._find(step, "full" if step is None else None))
            with self._stages().stage("choose"):
                entry = of_its_name(listing.entries[0])
            return self._restore(listing, entry, state, options, changes)

    def _restore(
        self,
        listing: Listing,
        entry: CheckpointInfo,
        state: Mapping[str, Any],
        options: Mapping[str, Any],
        changes: Changes,
    ) -> RestoreReport:
        from asyncckpt.restore import restore as restoring

        stages = self._stages()
        if entry.extra:
            shown = ", ".join(entry.extra[:5]) + (", …" if len(entry.extra) > 5 else "")
            log.warning("%s: files that the manifest does not list are not read: %s", entry.path, shown)
        with contextlib.ExitStack() as open_until_restored:
            with stages.stage("open"):
                checkpoint = open_until_restored.enter_context(listing.open(entry))
            with changes.told():
                report = restoring.restore(checkpoint, state, stages=stages, changes=changes, **options)
        self.events.emit(Restored(step=report.step, path=report.path, nbytes=report.nbytes, seconds=report.seconds))
        if report.derived or report.dropped:
            self.events.emit(
                RanksChanged(
                    step=report.step,
                    rank=stages.rank,
                    ranks=stages.size,
                    saved_ranks=report.saved_ranks,
                    derived=report.derived,
                    dropped=report.dropped,
                )
            )
        return report

    def _before_restore(self) -> None:
        """Called before live objects are changed; a run that is also written overrides it."""

    def _after_restore(self, report: RestoreReport) -> None:
        """Called after a restore that succeeded; a run that is also written overrides it."""

    def _stages(self) -> Stages:
        """Return the stages that a restore goes through: alone, or with the other ranks of a job."""
        from asyncckpt.restore.carrying_out import Stages

        return Stages()

    def _find(self, step: int | str | None, kind: str | None) -> Listing:
        """Find the checkpoint of a step or a name, the newest with None, and keep it open: it is the listing's only
        entry. Raises ``CheckpointNotFound``."""
        return Catalog(self._store, self.path).find_open(step, kind)

    def _candidates(self) -> Listing:
        """List the checkpoints that ``restore`` may choose from, and keep the newest full one open."""
        return Catalog(self._store, self.path).listing(newest_of("full"))

    def _is_gone(self, entry: CheckpointInfo) -> bool:
        """Return whether this very directory is not there any more: another one may have its name by now."""
        return is_gone(self._store, entry)

    def _restore_newest(self, state: Mapping[str, Any], options: Mapping[str, Any], changes: Changes) -> RestoreReport:
        reasons: dict[str, str] = {}
        for looks_left in reversed(range(LOOKS)):
            with self._candidates() as listing:
                entries = listing.entries
                vanished = False
                own = [entry for entry in entries if not entry.renamed]
                if own and not reasons:
                    tell_of_missing(self._store, self.path, own[-1])
                for entry in reversed([one for one in own if one.kind == "full" and one.name not in reasons]):
                    try:
                        with self._stages().stage("choose"):
                            if entry.damage is not None:
                                _refuse(listing, entry)
                        return self._restore(listing, entry, state, options, changes)
                    except CheckpointNotFound:
                        vanished = True
                    except SaveFailed:  # another rank was lost: the checkpoint is not at fault
                        raise
                    except (CheckpointDamaged, OSError) as error:
                        vanished = self._is_gone(entry)  # in the middle of reading it
                        if not vanished:
                            self._quarantine.add(entry.name)
                            reasons[entry.name] = f"{entry.path}: {error}"
                            what = f"checkpoint {entry.path} cannot be used: {error}"
                            warnings.warn(what, RuntimeWarning, stacklevel=3)
                            self.events.emit(FellBack(step=entry.step, path=entry.path, reason=str(error)))
                    if vanished and looks_left:  # deleted or replaced, because a newer one is there: that is the newest
                        break
            if not vanished:
                break
        if not entries:
            raise CheckpointNotFound(f"{self.path}: no checkpoint here")
        if not own:
            reasons[""] = (
                "they are copies, or were renamed: give one the name back that its manifest has, or restore(state, "
                "step=…) one of them and train into another directory"
            )
        elif not reasons:
            reasons[""] = "there are only weights-only checkpoints, which hold no training state"
        raise NoUsableCheckpoint(
            f"{self.path}: {len(entries)} checkpoints and none can be restored; nothing was deleted. Look with "
            f"`asyncckpt verify`, or train into another directory. " + "; ".join(reasons.values())
        )


def _refuse(listing: Listing, entry: CheckpointInfo) -> None:
    """Raise what is wrong with an entry that has ``damage``."""
    listing.open(entry).close()  # a newer format version is no damage, and says so itself
    raise CheckpointDamaged(f"{entry.path}: {entry.damage}")
