"""``Run`` reads a run directory. It needs no lease, so it works on a run that another process is writing."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.chosen import open_chosen, open_unseen, read_chosen
from asyncckpt.catalog.journal import JournalEntry, note, note_restores, read_journal
from asyncckpt.catalog.listing import CheckpointInfo, Listing, Preference
from asyncckpt.catalog.misplaced import is_checkpoint
from asyncckpt.catalog.newest import tell_of_missing
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.catalog.retention import KeepBest
from asyncckpt.errors import CheckpointNotFound, InvalidOption, storage_errors
from asyncckpt.events import EventBus
from asyncckpt.protocols import Reader, Store
from asyncckpt.read.config import read_config
from asyncckpt.read.damage import Damage
from asyncckpt.read.opening import OpenCheckpoint, open_checkpoint
from asyncckpt.read.verify import Progress, required_components, verify
from asyncckpt.restoring import RestoresState
from asyncckpt.storage import open_store
from asyncckpt.types import MANIFEST_FILE, Holder

# restore/ imports torch, which those who only look at a run do not wait for: the methods import it
if TYPE_CHECKING:
    import torch


log = logging.getLogger("asyncckpt")
_T = TypeVar("_T")


class Run(RestoresState):
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
        if events is None:
            self.events.note = functools.partial(note_restores, self._store)
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

    def best(
        self, metric: str, mode: Literal["min", "max", ""] = "", *, kind: Literal["full", "weights"] | None = None
    ) -> CheckpointInfo:
        """Return the row of the usable checkpoint with the best value of ``metric``: the smallest (``mode="min"``) or
        the largest (``mode="max"``). The mode must be given, but for a metric whose name ends in ``loss``.

        Metrics are those of ``save`` and of ``annotate``. Nan is never the best, and of equals the later save is.
        Looked at are the run's own checkpoints, those among them that training left by going back; ``kind`` restricts
        them to full or weights-only ones. Blocks on the disk. Raises ``CheckpointNotFound`` where there is no usable
        checkpoint, and ``InvalidOption`` where none has a value of that metric, which names the metrics that there
        are."""
        policy = KeepBest(metric, 1, mode=mode)
        if kind not in (None, "full", "weights"):
            raise InvalidOption(f"kind must be 'full', 'weights' or None, not {kind!r:.80}")
        entries = [e for e in self.ls() if e.damage is None and not e.renamed and kind in (None, e.kind)]
        if not entries:
            of_kind = f" of kind {kind!r}" if kind is not None else ""
            raise CheckpointNotFound(f"{self.path}: no usable checkpoint{of_kind} here")
        ranked = policy.ranked(entries)
        if not ranked:
            known = ", ".join(sorted({name for entry in entries for name in entry.metrics})) or "none"
            raise InvalidOption(
                f"{self.path}: no usable checkpoint has a value of the metric {metric!r}; metrics there: {known}. Give "
                f"it with save(..., metrics={{{metric!r}: …}}), or later with Run.annotate(step, {{{metric!r}: …}})"
            )
        return ranked[0]

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
            return self._verified(entry, reader, progress, expect_digest, required)

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
            return self._verified(entry, self._store.open(entry.name), progress, expect_digest, required)

    def _verified(
        self,
        entry: CheckpointInfo,
        opened: Reader,
        progress: Progress | None,
        expect_digest: str | None,
        require: Sequence[str],
    ) -> list[Damage]:
        began = time.perf_counter()
        with contextlib.closing(opened) as reader:
            damage = verify(reader, progress=progress, expect_digest=expect_digest, require=require)
        if entry.damage is not None and not damage:  # such as a name that is not the manifest's
            damage = [Damage(MANIFEST_FILE, 0, 0, entry.damage)]
        found = {"damage": len(damage), "first": str(damage[0])[:300]} if damage else {"damage": 0}
        seconds = round(time.perf_counter() - began, 6)
        note(self._store, "verify", entry.step, entry.name, nbytes=entry.nbytes, seconds=seconds, **found)
        return damage

    def holder(self) -> Holder | None:
        """Return who is recorded as the writer of the run, None where nobody is. It is a record, no lock: a writer that
        was killed is recorded until the next one comes. Blocks on the disk."""
        with storage_errors(self.path):
            return self._store.holder()

    def journal(self) -> list[JournalEntry]:
        """Return the lines of the journal that the run keeps beside its checkpoints, the oldest first; none where it
        keeps none. It is a hint, never truth: lines may be missing. Blocks on the disk."""
        return read_journal(self._store)

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
        """Read a checkpoint (default: see ``newest``) as plain containers and tensors, verified; no live object is
        needed. Blocks for the whole read. Returns one ``component``'s, or a dict of all of them.

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
        """Open the checkpoint of that step, or the newest, and return what ``read`` does."""
        with storage_errors(self.path):
            return read_chosen(self._store, step, read)

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
