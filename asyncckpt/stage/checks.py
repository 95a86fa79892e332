"""The checks of one snapshot find out what changes while it is copied, and fail the save rather than have it published
with values of a later moment.

What is deferred is checked by torch's counters of in-place changes and by samples of the bytes; what has not earned
that yet is on trial.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence

import torch

from asyncckpt.errors import ChangedWhileCopied
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.scope import SaveScope
from asyncckpt.stage.deferral import Deferral, Key, tensor_name
from asyncckpt.stage.eager import Division, OwnedMemory
from asyncckpt.stage.live_bytes import local_part, versions_of
from asyncckpt.stage.samples import Sampler, changed_samples, staged_as_sampled
from asyncckpt.stage.sources import Sources, numbers_of
from asyncckpt.stage.trial import Trial
from asyncckpt.state.known_state import KnownState, Picker, Recaptured, picker
from asyncckpt.types import Extent, Layout, LocalTensor, pieces_of

#: An in-place change counts when it ends. One that runs while the last copy ends is seen so much later, at least.
_SLOWEST_CHANGE_BYTES_PER_SECOND = 1e9
_LONGEST_PATIENCE_SECONDS = 0.1


class SnapshotChecks:
    """Checks one save. Thread-safe. Nothing is published before all that is deferred was found unchanged: either when
    the last copy had been made, or when the update of the tensor began, whichever came first.

    ``scope``: the save's, which a change fails. ``keys``: of the pieces, in order. ``layout``: of all
    that is staged. Made on the training thread, right when the snapshot is taken.
    """

    def __init__(
        self,
        scope: SaveScope,
        deferral: Deferral,
        keys: Sequence[Key],
        pieces: Sequence[LocalTensor],
        division: Division,
        owned: OwnedMemory,
        layout: Layout,
        sampler: Sampler,
        on_device: bool,
        known: KnownState | None = None,
        again: Recaptured | None = None,
    ) -> None:
        self._scope = scope
        self._deferral = deferral
        self._keys = keys
        self._lock = threading.Lock()
        self._extents = extents = layout.extents()
        self._pieces: Sequence[LocalTensor] = pieces
        self._tensors: Sequence[torch.Tensor] = pieces_of(pieces).tensors
        checked = division.checked
        cache = division.cache if division.cache is not None else {}
        if "checked" not in cache:  # a rank of a job that copies nothing has nothing that could change meanwhile
            cache["checked"] = frozenset(checked if extents else ())
        self._checked: frozenset[int] = cache["checked"]
        self._sources = Sources(known, again) if known is not None and again is not None and checked else None
        owners = {n: holder for n in division.on_trial if (holder := owned.holder_of(division.on_trial[n])) is not None}
        on_trial = {n: tensor for n, tensor in division.on_trial.items() if n in owners}
        self._trial = Trial(deferral, scope.step, keys, on_trial, owners, extents)
        #: Deferred pieces that may have changed before they were copied, as far as is known.
        self._open: frozenset[int] = self._checked
        #: Deferred pieces whose update has not begun yet.
        self._untouched: frozenset[int] = self._checked
        self._on_device = on_device
        self._left = len(extents)
        #: The pieces by memory block. Of a trial they are needed when the save may have ended.
        self._cache = cache
        if on_trial:
            self.pieces_in(())
        if self._checked:
            scope.await_verdict()
        self._addresses = division.addresses
        if known is not None and again is not None and again.is_same and checked:
            if "counted" not in cache:
                numbers = {known.numbers[id(holder)] for holder in owned.holders if id(holder) in known.numbers}
                cache["counted"] = picker(sorted(numbers.union(numbers_of(checked, known))))
            pick: Picker = cache["counted"]
            self._versions: tuple[Sequence[torch.Tensor], Sequence[int]] = pick(again.tensors), pick(again.versions)
        else:
            self._versions = _counted(pieces, checked, owned)
        self._samples = sampler.take(pieces, checked, owned, layout)
        nbytes = layout.nbytes if checked else 0
        #: How long whoever has made the last copy waits before ``settle``, unless training comes to a point first where
        #: none of its operations can be running.
        self.patience_seconds = min(_LONGEST_PATIENCE_SECONDS, nbytes / _SLOWEST_CHANGE_BYTES_PER_SECOND)

    # -- while it is copied ------------------------------------------------------------------------------------------

    def before_copying(self, extent: Extent) -> None:
        """Make sure that the memory of an extent's tensors is still theirs. Raises ``ChangedWhileCopied``."""
        sources = self._sources
        if sources is not None:
            sources.take(extent, self._checked)
        tensors = self._tensors
        moved = {
            segment.piece
            for segment in extent.segments
            if segment.piece in self._checked and not _lies_at(tensors[segment.piece], self._addresses[segment.piece])
        }
        if moved:
            raise self._changed(moved)

    def copied(self, number: int, slot: StagingBuffer) -> None:
        """Look at the extent with this number, whose copies have run. Raises ``ChangedWhileCopied``."""
        extent = self._extents[number]
        sources = self._sources
        if sources is not None:
            sources.give_back(extent, self._checked)
        if self._trial.compares:
            self._trial.copied(extent, slot)
        torn = {one.piece for one in self._samples if one.extent == number and not staged_as_sampled(one, extent, slot)}
        if torn:
            raise self._changed(torn)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last and self._on_device:
            self.settle()

    def settle(self) -> None:
        """All copies have been made (on a device: they have run): find out whether what was deferred has changed
        meanwhile. Fails the save where it has. Idempotent; does not raise."""
        with self._lock:
            waiting = self._open
        if not waiting:
            return
        self._close(waiting, self._moved(waiting) | changed_samples(self._samples, waiting))

    def update_begins(self, indexes: Collection[int] | None, *, known: bool = True) -> None:
        """The pieces with these indexes, None for all, are about to be changed as they may, and are copied (on a
        device: enqueued so that they are before). ``known``: whether it is known that their update begins. For the
        training thread."""
        if known:
            self._trial.update_begins(indexes)
        with self._lock:
            chosen = self._untouched if indexes is None else self._untouched.intersection(indexes)
            self._untouched = frozenset() if indexes is None else self._untouched - chosen
        if chosen:
            changed = self._moved(chosen) | changed_samples(self._samples, chosen)
            lucky = changed - self._close(chosen, changed)
            if lucky:  # their copies were right, this time
                self._deferral.lose(self._scope.step, [self._keys[index] for index in lucky])

    def _close(self, looked_at: frozenset[int], changed: set[int]) -> frozenset[int]:
        """Fail the save for the changed pieces that were still open, and return them; nobody needs to look at the
        others again."""
        with self._lock:  # an update that has begun meanwhile has closed what it changes
            torn = self._open & changed
            is_all = looked_at is self._open or self._open <= looked_at
            decided = not torn and bool(self._open) and is_all
            self._open = frozenset() if is_all else self._open - looked_at
        if torn:
            self._scope.fail(self._changed(torn))
        elif decided:
            self._scope.verdict()
        return torn

    def _changed(self, indexes: Collection[int]) -> ChangedWhileCopied:
        keys = [self._keys[index] for index in sorted(indexes)]
        self._deferral.lose(self._scope.step, keys)
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return ChangedWhileCopied(
            f"step {self._scope.step}: {tensor_name(keys[0])}{more} was changed after save() and before its copy was "
            f"made, and not by the step of a watched optimizer. Nothing was published; earlier checkpoints are "
            f"untouched. It is copied before save() returns from now on; or make the change inside "
            f"Checkpointer.guard(), or once PendingSave.staged() has returned"
        )

    def _moved(self, indexes: Collection[int]) -> set[int]:
        """Return those of the pieces whose memory torch has counted an in-place change of since ``save``."""
        (holders, versions), pieces = self._versions, self._pieces
        now = versions_of(holders)
        if tuple(now) == tuple(versions) or not pieces:
            return set()
        spans = [_span(h) for h, old, new in zip(holders, versions, now, strict=True) if old != new]
        found: set[int] = set()
        for index in indexes:
            begin, end = _span(pieces[index].tensor)
            if any(first < end and begin < last for first, last in spans):
                found.add(index)
        return found

    # -- what belongs to whom ----------------------------------------------------------------------------------------

    def pieces_in(self, blocks: Iterable[int]) -> set[int]:
        """Return the indexes of the pieces that lie in memory blocks with these addresses; none where that is not known
        any more, because the save has ended. For the training thread."""
        if "by block" not in self._cache and self._pieces:
            self._cache["by block"] = _by_block(self._tensors)
        found: dict[int, set[int]] = self._cache.get("by block", {})
        return {index for block in blocks for index in found.get(block, ())}

    @property
    def unsettled(self) -> bool:
        """Whether something deferred may still have changed before it was copied, as far as is known."""
        return bool(self._open)

    @property
    def awaits_update(self) -> bool:
        """Whether ``update_begins`` has something to look at. Takes no lock."""
        return bool(self._untouched) or self._trial.awaits_update

    def waits_for_device(self) -> bool:
        """Take in what a device has found out by now; return whether there is more to come. For the training thread,
        not while a CUDA graph is captured."""
        return self._trial.waits_for_device()

    def forget(self) -> None:
        """Drop the references to the tensors: the save has ended."""
        self._pieces = self._tensors = ()
        self._versions = [], []
        self._sources = None


def _lies_at(tensor: torch.Tensor, address: int) -> bool:
    # a storage may have been resized, as sharded modules do with parameters that they gather
    storage = tensor.untyped_storage()
    return tensor.data_ptr() == address and address + tensor.element_size() <= storage.data_ptr() + storage.nbytes()


def _by_block(tensors: Sequence[torch.Tensor]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault(tensor.untyped_storage().data_ptr(), set()).add(index)
    return found


def _counted(
    pieces: Sequence[LocalTensor], checked: Sequence[int], owned: OwnedMemory
) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
    """Return the tensors whose in-place changes torch counts for these pieces, and its counts of now."""
    if not checked:
        return [], []
    held = {id(holder) for holder in owned.holders}
    # what a module holds may have a counter of its own, such as a view that was put into ``parameter.data``
    holders = [*owned.holders, *(tensor for n in checked if id(tensor := pieces[n].tensor) not in held)]
    return holders, versions_of(holders)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    here = local_part(tensor)
    begin = here.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True))
    return begin, begin + (last + 1) * here.element_size() if here.numel() else begin
