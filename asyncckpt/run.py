"""``Run`` reads a run directory. It needs no lease, so it works on a run that another process is writing."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyncckpt.catalog.catalog import Catalog, CheckpointInfo
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, NoUsableCheckpoint, storage_errors
from asyncckpt.events import EventBus, FellBack, Restored
from asyncckpt.protocols import Reader, Store
from asyncckpt.read.damage import Damage
from asyncckpt.read.opening import open_manifest
from asyncckpt.read.verify import Progress, verify
from asyncckpt.storage import open_store
from asyncckpt.types import MANIFEST_FILE

# restore/ imports torch, which those who only look at a run do not wait for: the methods import it
if TYPE_CHECKING:
    import torch

    from asyncckpt.restore.restore import Rename, RestoreReport, Stages

#: The newest checkpoint is looked for anew so many times, while another process publishes and deletes.
_LOOKS = 20


class Run:
    """Reads a run directory. Thread-safe. ``Checkpointer`` adds the writing side.

    ``path``: a directory, or an address that ``asyncckpt.storage.open_store`` takes. ``direct``: read past the page
    cache where the file system has O_DIRECT. ``events``: gets ``Restored`` and ``FellBack``. ``store``: a storage
    backend of your own, instead of the one that the path names. Every method blocks on the disk, and raises
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

    def verify(
        self, step: int | None = None, *, progress: Progress | None = None, expect_digest: str | None = None
    ) -> list[Damage]:
        """Read every byte of a checkpoint (default: the newest) past the page cache, and return what is damaged: an
        empty list means that it is good. Blocks for the whole read.

        ``progress(done_bytes, total_bytes)`` is called on reader threads. ``expect_digest``: see ``restore``; a
        manifest of another digest is damage. Raises ``CheckpointNotFound``, ``VersionUnsupported``, ``MissingExtra``
        and ``MemoryError``."""
        with storage_errors(self.path):
            entry, reader = self._open_chosen(step, misnamed=True)
            return _verified(entry, reader, progress, expect_digest)

    def verify_entry(
        self, entry: CheckpointInfo, *, progress: Progress | None = None, expect_digest: str | None = None
    ) -> list[Damage]:
        """Verify the checkpoint of one row of ``ls``: a step can have a full and a weights-only one. See ``verify``."""
        with storage_errors(self.path):
            return _verified(entry, self.open_entry(entry), progress, expect_digest)

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | None = None,
        *,
        strict: bool = True,
        include: Sequence[str] | None = None,
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
        ``strict=False`` leaves them as they are and reports them. Raises ``CheckpointNotFound``, ``CheckpointDamaged``
        on bad bytes (tensors may then hold a mix of old and new values), ``NoUsableCheckpoint`` where checkpoints
        exist and none can be restored, ``VersionUnsupported``, ``InvalidOption`` and, in a job, ``RankLost``.
        """
        self._before_restore()
        options = {"strict": strict, "include": include, "rename": rename, "device": device, "dtype": dtype}
        with storage_errors(self.path):
            if expect_digest is not None:
                options["expect_digest"] = expect_digest
                catalog = Catalog(self._store, self.path)
                entry = catalog.newest() if step is None else _of_its_name(catalog.find(step))
                report = self._restore(entry.name, state, options)
            elif step is None:
                report = self._restore_newest(state, options)
            else:
                with self._stages().stage("find"):
                    name = _of_its_name(Catalog(self._store, self.path).find(step)).name
                report = self._restore(name, state, options)
        self._after_restore(report)
        return report

    def load_tensors(
        self,
        step: int | None = None,
        names: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expect_digest: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read tensors of a checkpoint (default: the newest) into new memory, verified. Blocks for the whole read.

        Returns ``{"model.wte.weight": tensor, …}``, each of its stored shape. ``names``: qualified names, prefixes of
        them that end before a dot, or components; None takes all. ``device``: the tensors' (default: torch's).
        ``dtype``: the dtype of the floating ones (default: as stored). ``expect_digest``: see ``restore``.
        Raises ``UnknownName``, ``CheckpointNotFound``, ``CheckpointDamaged``, ``VersionUnsupported``.
        """
        from asyncckpt.restore.restore import load_tensors

        with storage_errors(self.path), contextlib.closing(self._open_chosen(step)[1]) as reader:
            return load_tensors(reader, names, device=device, dtype=dtype, expect_digest=expect_digest)

    def open(self, step: int | None = None) -> Reader:
        """Open a checkpoint (default: the newest of any kind), which retention spares until the reader is closed.
        Raises ``CheckpointNotFound``, and ``CheckpointDamaged`` where it holds another step than its name says."""
        with storage_errors(self.path):
            return self._open_chosen(step)[1]

    def open_entry(self, entry: CheckpointInfo) -> Reader:
        """Open the checkpoint of one row of ``ls``; see ``open``. Raises ``CheckpointNotFound`` where it was deleted
        meanwhile."""
        with storage_errors(self.path):
            return self._store.open(entry.name)

    def pin(self, step: int) -> CheckpointInfo:
        """Never let retention delete this checkpoint, in this run or a later one; return its row. Needs no lease, and
        works while another process prunes. Raises ``CheckpointNotFound`` and ``RunPathError``."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).pin(step)

    def unpin(self, step: int) -> CheckpointInfo:
        """Let retention delete the checkpoint again. Raises as ``pin`` does."""
        with storage_errors(self.path):
            return Catalog(self._store, self.path).pin(step, pinned=False)

    def _open_chosen(self, step: int | None, *, misnamed: bool = False) -> tuple[CheckpointInfo, Reader]:
        """Find the checkpoint of that step, or the newest of any kind, and open it, so that retention spares it."""
        catalog = Catalog(self._store, self.path)
        looks_left = _LOOKS
        while True:
            entry = catalog.newest(None) if step is None else catalog.find(step)
            if not misnamed:
                _of_its_name(entry)
            try:
                return entry, self._store.open(entry.name)
            except CheckpointNotFound:  # retention took it meanwhile, because a newer one is there
                looks_left -= 1
                if not looks_left:
                    raise

    def _restore(self, name: str, state: Mapping[str, Any], options: Mapping[str, Any]) -> RestoreReport:
        from asyncckpt.restore import restore as restoring

        stages = self._stages()
        with stages.stage("open"):
            opened = self._store.open(name)
        with contextlib.closing(opened) as reader:
            report = restoring.restore(reader, state, stages=stages, **options)
        self.events.emit(Restored(step=report.step, path=report.path, nbytes=report.nbytes, seconds=report.seconds))
        return report

    def _before_restore(self) -> None:
        """Called before live objects are changed; a run that is also written overrides it."""

    def _after_restore(self, report: RestoreReport) -> None:
        """Called after a restore that succeeded; a run that is also written overrides it."""

    def _stages(self) -> Stages:
        """Return the stages that a restore goes through: alone, or with the other ranks of a job."""
        from asyncckpt.restore.restore import Stages

        return Stages()

    def _candidates(self) -> list[CheckpointInfo]:
        """Return the checkpoints that ``restore`` may choose from, the oldest save first."""
        return Catalog(self._store, self.path).entries()

    def _is_gone(self, entry: CheckpointInfo) -> bool:
        return self._store.identity(entry.name) is None

    def _refuse(self, entry: CheckpointInfo) -> None:
        with contextlib.closing(self._store.open(entry.name)) as reader:
            open_manifest(reader)  # a newer format version is no damage, and says so itself
        raise CheckpointDamaged(f"{entry.path}: {entry.damage}")

    def _restore_newest(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> RestoreReport:
        reasons: dict[str, str] = {}
        for looks_left in reversed(range(_LOOKS)):
            entries = self._candidates()
            vanished = False
            own = [entry for entry in entries if not entry.renamed]
            for entry in reversed([one for one in own if one.kind == "full" and one.name not in reasons]):
                try:
                    with self._stages().stage("choose"):
                        if entry.damage is not None:
                            self._refuse(entry)
                    return self._restore(entry.name, state, options)
                except CheckpointNotFound:
                    vanished = True
                except (CheckpointDamaged, OSError) as error:
                    vanished = self._is_gone(entry)  # in the middle of reading it
                    if not vanished:
                        self._quarantine.add(entry.name)
                        reasons[entry.name] = f"{entry.path}: {error}"
                        warnings.warn(f"checkpoint {entry.path} cannot be used: {error}", RuntimeWarning, stacklevel=3)
                        self.events.emit(FellBack(step=entry.step, path=entry.path, reason=str(error)))
                if vanished and looks_left:  # retention took it, because a newer one is there: that is the newest now
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


def _of_its_name(entry: CheckpointInfo) -> CheckpointInfo:
    """Return the entry. Raises ``CheckpointDamaged`` where it holds another step than its name says."""
    if entry.misnamed:
        raise CheckpointDamaged(f"{entry.path}: {entry.damage}")
    return entry


def _verified(
    entry: CheckpointInfo, opened: Reader, progress: Progress | None, expect_digest: str | None
) -> list[Damage]:
    with contextlib.closing(opened) as reader:
        damage = verify(reader, progress=progress, expect_digest=expect_digest)
    if entry.damage is not None and not damage:  # such as a name that is not the manifest's
        damage = [Damage(MANIFEST_FILE, 0, 0, entry.damage)]
    return damage
