"""``Run`` reads a run directory. It needs no lease, so it works on a run that another process is writing."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.chosen import LOOKS, damaged_newest, is_gone, of_its_name, open_chosen, open_unseen
from asyncckpt.catalog.listing import CheckpointInfo, Listing, Preference, newest_of
from asyncckpt.catalog.misplaced import is_checkpoint
from asyncckpt.catalog.newest import tell_of_missing
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    DigestMismatch,
    NoUsableCheckpoint,
    RanksDisagree,
    SaveFailed,
    storage_errors,
)
from asyncckpt.events import EventBus, FellBack, RanksChanged, Restored
from asyncckpt.protocols import Reader, Store
from asyncckpt.read.config import read_config
from asyncckpt.read.damage import Damage
from asyncckpt.read.opening import OpenCheckpoint, open_checkpoint
from asyncckpt.read.verify import Progress, required_components, verify
from asyncckpt.restore.changes import Changes
from asyncckpt.storage import open_store
from asyncckpt.types import MANIFEST_FILE

# restore/ imports torch, which those who only look at a run do not wait for: the methods import it
if TYPE_CHECKING:
    import torch

    from asyncckpt.restore.carrying_out import Stages
    from asyncckpt.restore.restore import Rename, RestoreReport

log = logging.getLogger("asyncckpt")
_T = TypeVar("_T")


class Run:
    """Reads a run directory. Thread-safe. ``Checkpointer`` adds the writing side.

    ``path``: a directory, or an address that ``asyncckpt.storage.open_store`` takes. ``direct``: read past the page
    cache where the file system has O_DIRECT. ``events``: gets ``Restored`` and ``FellBack``. ``store``: a storage
    backend of your own, instead of the one that the path names. Where a method takes a step, it takes a name, too: that
    of the checkpoint which was saved last of those with this name. Every method blocks on the disk, and raises
    ``StorageFailed`` where the storage itself fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        direct: bool = True,
        events: EventBus | None = None,
        store: Store | None = None,
    ) -> None:
        self._store = store if store is not None else open_store(path, direct=direct)
        self.path = self._store.address
        self.events = events or EventBus()
        #: Names of the checkpoints whose files were found damaged.
        self._quarantine = Quarantine()

    def ls(self) -> list[CheckpointInfo]:
        """List the checkpoints of this run, the oldest save first, unusable ones included (``.damage`` says why).
        Reads manifests and file sizes, not data."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).entries()

    def check_path(self) -> None:
        """Look whether the path can be a run's. Raises ``RunPathError`` where it is a checkpoint itself, one level too
        deep."""
        with storage_errors(self.path):
            if is_checkpoint(self._store):
                Catalog(self._store, self.path).entries()  # raises, unless there are checkpoints in it all the same

    def listing(self, prefer: Preference) -> Listing:
        """List the checkpoints as ``ls`` does, and keep the preferred one open, for a caller who goes on to read it.
        Close the listing."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).listing(prefer)

    def newest(self) -> CheckpointInfo:
        """Return the row of the newest checkpoint, damaged or not (``.damage`` says why): the full one that was saved
        last, or, in a run that has no full one, the last weights-only one. ``verify``, ``load_tensors`` and ``open``
        mean this one where they are given no step, and so do the command's verbs by ``latest``. Copies and renamed
        checkpoints never are. Raises ``CheckpointNotFound``."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).newest()

    def tell_of_missing(self, newest: CheckpointInfo) -> None:
        """Log where the run has saved a later checkpoint than this one, and it is not there any more: retention deletes
        no newest one, so somebody else has taken it away."""
        with storage_errors(self.path):
            tell_of_missing(self._store, self.path, newest)

    def verify(
        self,
        step: int | str | None = None,
        *,
        progress: Progress | None = None,
        expect_digest: str | None = None,
        require: str | Sequence[str] = (),
    ) -> list[Damage]:
        """Read every byte of a checkpoint (default: the newest, see ``newest``) past the page cache, and return what is
        damaged: an empty list means that it is good. Blocks for the whole read.

        ``progress(done_bytes, total_bytes)`` is called on reader threads. ``expect_digest``: see ``restore``; a
        manifest of another digest is damage. ``require``: names of components, such as ``("model", "optimizer")``; each
        that the checkpoint lacks is among the damage. Raises ``CheckpointNotFound``, ``VersionUnsupported``,
        ``MissingExtra``, ``InvalidOption`` and ``MemoryError``."""
        required = required_components(require)
        with storage_errors(self.path):
            entry, reader = open_unseen(self._store, step)
            return _verified(entry, reader, progress, expect_digest, required)

    def verify_entry(
        self,
        entry: CheckpointInfo,
        *,
        progress: Progress | None = None,
        expect_digest: str | None = None,
        require: str | Sequence[str] = (),
    ) -> list[Damage]:
        """Verify the checkpoint of one row of ``ls``: a step can have a full and a weights-only one. See ``verify``."""
        required = required_components(require)
        with storage_errors(self.path):
            return _verified(entry, self._store.open(entry.name), progress, expect_digest, required)

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
        self._after_restore(report)
        return report

    def load_tensors(
        self,
        step: int | str | None = None,
        names: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expect_digest: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read tensors of a checkpoint (default: the newest, see ``newest``) into new memory, verified. Blocks for the
        whole read.

        Returns ``{"model.wte.weight": tensor, …}``, each of its stored shape. ``names``: qualified names, prefixes of
        them that end before a dot, or components; None takes all. ``device``: the tensors' (default: torch's).
        ``dtype``: the dtype of the floating ones (default: as stored). ``expect_digest``: see ``restore``.
        Raises ``UnknownName``, ``CheckpointNotFound``, ``CheckpointDamaged``, ``VersionUnsupported``, and
        ``NewestDamaged`` where no step was given: an older checkpoint is never read in place of the newest.
        """
        from asyncckpt.restore.restore import load_tensors

        options: dict[str, Any] = {"device": device, "dtype": dtype, "expect_digest": expect_digest}
        return self._read(step, lambda checkpoint: load_tensors(checkpoint, names, **options))

    def load(
        self,
        step: int | str | None = None,
        component: str | None = None,
        like: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expect_digest: str | None = None,
    ) -> Any:
        """Read a checkpoint (default: the newest of any kind) as plain containers and tensors, verified; no live object
        is needed. Blocks for the whole read. Returns one ``component``'s, or a dict of all of them.

        A module gives a dict of tensors by FQN; an optimizer what its ``state_dict()`` has, keyed by the names of
        parameters, which torch's ``load_state_dict`` takes; anything else what it was. ``like`` has the same form, and
        says what to read: of dicts only the keys that it has, ``None`` for whatever was saved. Its tensors are filled
        in place and returned, ``DTensor``s by the rows that this rank holds (all ranks make this call then); a tensor
        on the meta device gives a new one of its shape and dtype, on ``device``. Its other values give their types.
        ``device``: where new tensors are made (default: torch's). ``dtype``: the dtype of new floating tensors, and one
        that those of ``like`` may have whatever was saved. ``expect_digest``: see ``restore``.

        Raises ``StateMismatch`` before anything is read, ``UnknownName``, ``InvalidOption``, ``CheckpointNotFound``,
        ``CheckpointDamaged`` (tensors of ``like`` may then hold a mix), ``VersionUnsupported``.
        """
        from asyncckpt.restore.load import load

        options: dict[str, Any] = {"device": device, "dtype": dtype, "expect_digest": expect_digest}
        return self._read(step, lambda checkpoint: load(checkpoint, component, like, **options))

    def config(self, step: int | str | None = None, like: Any = None) -> Any:
        """Return the ``config`` that the run was given when it saved a checkpoint (default: the newest), None where it
        was given none. ``like``: a value whose types it gets, such as a dataclass or a ``DictConfig``; without it
        values of such types are plain data. Raises ``StateMismatch``, ``CheckpointNotFound``, ``CheckpointDamaged``,
        ``VersionUnsupported``."""
        return self._read(step, lambda checkpoint: read_config(checkpoint, like))

    def _read(self, step: int | str | None, read: Callable[[OpenCheckpoint], _T]) -> _T:
        """Open the checkpoint of that step, or the newest of any kind, and return what ``read`` does."""
        with storage_errors(self.path):
            for looks_left in reversed(range(LOOKS)):
                entry, opened = open_chosen(self._store, step)
                with opened as checkpoint:
                    try:
                        return read(checkpoint)
                    except CheckpointDamaged as error:
                        # where the file system has no locks, it may be deleted or replaced while it is read
                        if looks_left and self._is_gone(entry):
                            continue
                        if step is None and not isinstance(error, DigestMismatch):
                            raise damaged_newest(self._store, entry, error) from error
                        raise
        raise AssertionError("unreachable")

    def assets(self, step: int | str | None = None) -> dict[str, bytes]:
        """Read the files that were given as ``assets`` to a checkpoint (default: the newest), each verified: bytes by
        name, none where it has none. Blocks on the disk. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` and
        ``VersionUnsupported``."""
        with storage_errors(self.path), open_chosen(self._store, step)[1] as checkpoint:
            return checkpoint.assets()

    def open(self, step: int | str | None = None) -> OpenCheckpoint:
        """Open a checkpoint (default: the newest, see ``newest``), which retention spares until it is closed. Raises
        ``CheckpointNotFound``, ``VersionUnsupported``, and ``CheckpointDamaged`` where files are missing or have other
        sizes than the manifest says, or where it holds another step than its name says: ``NewestDamaged`` where no step
        was given."""
        with storage_errors(self.path):
            return open_chosen(self._store, step)[1]

    def open_entry(self, entry: CheckpointInfo) -> OpenCheckpoint:
        """Open the checkpoint of one row of ``ls``; see ``open``. Raises ``CheckpointNotFound`` where it was deleted
        meanwhile."""
        with storage_errors(self.path):
            return open_checkpoint(self._store.open(entry.name))

    def pin(self, step: int | str) -> CheckpointInfo:
        """Never let retention delete this checkpoint, in this run or a later one; return its row. Needs no lease, and
        works while another process prunes. Raises ``CheckpointNotFound`` and ``RunPathError``."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).pin(step)

    def unpin(self, step: int | str) -> CheckpointInfo:
        """Let retention delete the checkpoint again. Raises as ``pin`` does."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).pin(step, pinned=False)

    def annotate(self, step: int | str, metrics: Mapping[str, Any]) -> CheckpointInfo:
        """Give a checkpoint metrics that were found after it was saved, such as ``{"val_loss": 0.3}``; return its row.

        They are durable when this returns, lie beside the checkpoint (its files and its digest stay what they are), and
        count like those that it was saved with: for ``ls``, and for ``KeepBest`` at the writer's next retention, which
        may be that of another process. Of two of one name the later counts. They belong to this save: a step that is
        saved again has none of them, and they are deleted with the checkpoint. Of a step's two kinds the full one is
        meant. Needs no lease; blocks on the disk. In a job, call it on one rank. Raises ``CheckpointNotFound``,
        ``CheckpointDamaged`` (it cannot be used), ``InvalidOption`` (names or numbers) and ``RunPathError``."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).annotate(step, metrics)

    def _restore_chosen(
        self, step: int | str | None, state: Mapping[str, Any], options: Mapping[str, Any], changes: Changes
    ) -> RestoreReport:
        """Restore the checkpoint of that step, or the newest full one, and no other."""
        with contextlib.ExitStack() as open_until_restored:
            stages = self._stages()
            with stages.stage("find"):
                found = Catalog(self._store, self.path).find_open(step, "full" if step is None else None)
                listing = open_until_restored.enter_context(found)
                entry = of_its_name(listing.entries[0])
            if not stages.in_all([entry.attempt or entry.name]):  # a save was published between two ranks' looks
                raise RanksDisagree(
                    f"{self.path}: {step!r} is {entry.path} on rank {stages.rank}, and another checkpoint on others. "
                    f"Nothing was restored: call wait() on all ranks first, or restore once saving has ended"
                )
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


def _verified(
    entry: CheckpointInfo,
    opened: Reader,
    progress: Progress | None,
    expect_digest: str | None,
    require: Sequence[str],
) -> list[Damage]:
    with contextlib.closing(opened) as reader:
        damage = verify(reader, progress=progress, expect_digest=expect_digest, require=require)
    if entry.damage is not None and not damage:  # such as a name that is not the manifest's
        damage = [Damage(MANIFEST_FILE, 0, 0, entry.damage)]
    return damage
