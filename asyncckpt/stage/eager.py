"""Decides which tensors may be copied while training goes on: those whose memory a watched optimizer owns."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from asyncckpt.stage.live_bytes import local_part
from asyncckpt.stage.places import Places, places_of
from asyncckpt.state.wrappers import PLAIN_TYPES
from asyncckpt.types import LocalTensor, Pieces, pieces_of

#: Small tensors that could change in the forward pass are cloned instead of staged at once: a buffer in every extent
#: would otherwise make ``save`` wait for the whole arena.
_CLONE_BELOW_BYTES = 1 << 20
_CLONE_TOTAL_BYTES = 16 << 20


def storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return the addresses of the memory blocks behind the tensors; for a DTensor, behind the part that is here."""
    return {local_part(tensor).untyped_storage().data_ptr() for tensor in tensors}


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte, and the one behind its last byte."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * tensor.element_size()
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills all bytes from its first to its last one, in whatever order (channels last, say)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass(slots=True)
class OwnedRanges:
    """The byte ranges of some tensors. ``sizes``: of contiguous ones, by address; ``others``: begins and ends of the
    rest; ``indexes``: of the tensors, by address."""

    places: Places
    sizes: dict[int, int] = field(default_factory=dict)
    others: list[tuple[int, int]] = field(default_factory=list)
    indexes: dict[int, int] = field(default_factory=dict)
    begins: list[int] = field(default_factory=list)


class OwnedMemory:
    """Collects the byte ranges that nothing but the update of a watched optimizer changes. ``before``: those of the
    save before, which are taken over where all tensors lie as they did then."""

    def __init__(self, before: OwnedRanges | None = None) -> None:
        self._before = before
        self.ranges = OwnedRanges(places_of([]))
        #: The tensors that were added, as the optimizer holds them.
        self.holders: Sequence[torch.Tensor] = []

    @classmethod
    def known(cls, ranges: OwnedRanges, holders: Sequence[torch.Tensor]) -> OwnedMemory:
        """Return the memory of tensors that lie where they did when ``ranges`` were found."""
        memory = cls(ranges)
        memory.ranges, memory.holders = ranges, holders
        return memory

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        self.holders = [*self.holders, *tensors]
        here = [one if type(one) in PLAIN_TYPES else local_part(one) for one in self.holders]
        places, before = places_of(here), self._before
        self.ranges = before if before is not None and before.places == places else _ranges(here, places)

    def holder_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor, as the optimizer holds it, in whose memory this one begins; None where there is none."""
        ranges = self.ranges
        exact = ranges.indexes.get(tensor.data_ptr())
        if exact is not None:
            return self.holders[exact]
        if not ranges.begins:
            ranges.begins = sorted(ranges.indexes)
        at = bisect.bisect_right(ranges.begins, tensor.data_ptr()) - 1
        if at < 0:
            return None
        found = self.holders[ranges.indexes[ranges.begins[at]]]
        same_block = local_part(found).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return found if same_block else None

    def doubtful(self, places: Places) -> list[int]:
        """Return the indexes of those tensors of which it takes more than a look at an address to tell whether they lie
        in owned ranges."""
        size_at = self.ranges.sizes.get
        return [
            index
            for index, (address, count, item, contiguous) in enumerate(
                zip(places.addresses, places.counts, places.items, places.contiguous, strict=True)
            )
            if size_at(address) != count * item or not contiguous
        ]

    def not_covered(self, doubtful: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return those of the doubtful tensors that do not lie wholly in owned ranges."""
        uncovered = [tensor for tensor in doubtful if self._is_apart(tensor)]  # buffers
        if len(uncovered) == len(doubtful):
            return uncovered
        whole = ((address, address + nbytes) for address, nbytes in self.ranges.sizes.items())
        ranges = _merge(sorted([*whole, *self.ranges.others]))
        return [tensor for tensor in doubtful if not _lies_in(*_span(tensor), ranges)]

    def _is_apart(self, tensor: torch.Tensor) -> bool:
        """Whether nothing owned covers a tensor for sure, because it begins where its memory block does. False says
        nothing."""
        address = tensor.data_ptr()
        return address not in self.ranges.sizes and not self.ranges.others and address == _block(tensor)[0] != 0


def _ranges(tensors: Sequence[torch.Tensor], places: Places) -> OwnedRanges:
    found = OwnedRanges(places)
    for index, tensor in enumerate(tensors):
        begin = places.addresses[index]
        if places.contiguous[index]:
            found.indexes[begin] = index
            found.sizes[begin] = max(found.sizes.get(begin, -1), places.counts[index] * places.items[index])
        elif _is_dense(tensor):  # what lies in the gaps of others belongs to somebody else
            found.others.append(_span(tensor))
            found.indexes[begin] = index
    return found


def _lies_in(begin: int, end: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether one of the ranges, sorted and disjoint, holds this one; true for an empty one."""
    if begin == end:
        return True
    at = bisect.bisect_right(ranges, begin, key=lambda found: found[0]) - 1
    return at >= 0 and end <= ranges[at][1]


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


@dataclass(frozen=True, slots=True)
class Division:
    """``eager``: indexes of the pieces that must be staged before ``save`` returns. ``deferred``: indexes of those that
    may be copied until the update that changes them. ``on_trial``: the tensors, by index, that are copied at once but
    might be deferred once a step has shown that nothing else changes them. ``checked``: those of the deferred ones that
    something else could change. ``addresses``: where all pieces begin in memory. ``cache``: what others have found out
    about a division that stays as it is; None where that is not known."""

    eager: set[int]
    deferred: Sequence[int]
    on_trial: Mapping[int, torch.Tensor]
    checked: Sequence[int] = ()
    addresses: Sequence[int] = ()
    cache: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Decided:
    """What was decided, and all that it depends on. ``blocks``: the memory blocks of the pieces ``looked_at``.
    ``at_once``: the pieces that may change any time; of the others ``now`` has not earned it to be deferred. ``known``:
    the state whose pieces were divided, where it is known."""

    ranges: OwnedRanges
    places: Places
    private: list[bool]
    frozen: list[bool]
    looked_at: list[int]
    blocks: list[tuple[int, int]]
    earned: Collection[int] | None
    at_once: set[int]
    now: list[int]
    deferred: list[int]
    checked: list[int]
    known: object = None
    cache: dict[str, Any] = field(default_factory=dict)


class Divider:
    """Divides snapshots. A training state lies where it did at the save before: then what was decided holds, as long as
    the same tensors have earned to be deferred. Where tensors lie, and everything else that the decision depends on, is
    read and compared each time. Keeps no tensor. For the training thread."""

    def __init__(self) -> None:
        self._decided: _Decided | None = None

    def divide(
        self,
        pieces: Sequence[LocalTensor],
        owned: OwnedMemory,
        earned: Collection[int] | None = None,
        known: object = None,
    ) -> Division:
        """Decide which pieces are copied when. Small pieces that would have to be staged at once are cloned, in
        ``pieces`` itself. ``earned``: the indexes of those that may be deferred at all; None for every one. ``known``:
        the same object as long as all pieces are known to be and to lie as they did; None where nobody knows that.

        A piece is deferred only where all pieces in its memory block lie in owned ranges and none of them is a frozen
        parameter, under whatever name: flattened modules share one block, and one write may change more of it than one
        tensor.
        """
        last = self._decided
        if known is None or last is None or last.known is not known or last.ranges is not owned.ranges:
            last = None
        if last is None or last.earned is not earned:
            last = self._decide(pieces, owned, earned, known)
        found = self._decided = last
        on_trial: dict[int, torch.Tensor] = {}
        eager: set[int] = set()
        cloned = 0
        for index in found.now:
            piece = pieces[index]
            tensor = piece.tensor
            if index not in found.at_once and _can_be_tried(tensor):
                on_trial[index] = tensor
            nbytes = piece.spec.nbytes
            # a clone saves nothing where all extents are staged now
            if found.deferred and nbytes <= _CLONE_BELOW_BYTES and cloned + nbytes <= _CLONE_TOTAL_BYTES:
                clone = tensor.detach().clone()
                if isinstance(pieces, Pieces):
                    pieces.tensors[index] = clone
                else:
                    piece.tensor = clone
                cloned += nbytes
            else:
                eager.add(index)
        cache = found.cache if found.known is not None else None
        return Division(eager, found.deferred, on_trial, found.checked, found.places.addresses, cache)

    def _decide(
        self, pieces: Sequence[LocalTensor], owned: OwnedMemory, earned: Collection[int] | None, known: object
    ) -> _Decided:
        listed = pieces_of(pieces)
        tensors = listed.tensors
        places = places_of(tensors)
        private = [False] * len(tensors) if listed is pieces else [piece.private for piece in pieces]
        frozen = [spec.frozen for spec in listed.specs]
        last = self._decided
        if (
            last is not None
            and last.ranges is owned.ranges
            and last.places == places
            and last.private == private
            and last.frozen == frozen
            and last.blocks == [_block(tensors[index]) for index in last.looked_at]
        ):
            if last.earned is earned:
                return last if last.known is known else replace(last, known=known, cache={})
            looked_at, blocks, at_once = last.looked_at, last.blocks, last.at_once
        else:
            doubtful = [n for n in owned.doubtful(places) if not private[n] and not frozen[n]]
            still = [n for n, is_still in enumerate(frozen) if is_still and not private[n]]
            looked_at = doubtful + still
            blocks = [_block(tensors[index]) for index in looked_at]
            risky = owned.not_covered([tensors[n] for n in doubtful]) + [tensors[n] for n in still]
            at_once = _lying_in({_block(tensor) for tensor in risky}, places.addresses, private)
        now: list[int] = []
        deferred: list[int] = []
        for index, (count, is_private) in enumerate(zip(places.counts, private, strict=True)):
            may_wait = earned is None or index in earned or is_private or not count
            (deferred if may_wait and index not in at_once else now).append(index)
        checked = [n for n in deferred if places.counts[n] and not private[n]]
        return _Decided(
            owned.ranges, places, private, frozen, looked_at, blocks, earned, at_once, now, deferred, checked, known
        )


#: The memory of tensors on these devices can be compared with what was staged.
_TRIED_DEVICES = frozenset({"cpu", "cuda"})


def _can_be_tried(tensor: torch.Tensor) -> bool:
    return tensor.device.type in _TRIED_DEVICES and not tensor.is_conj() and not tensor.is_neg()


def divide(
    pieces: Sequence[LocalTensor],
    owned: OwnedMemory,
    earned: Collection[int] | None = None,
    divider: Divider | None = None,
    known: object = None,
) -> Division:
    """Divide a snapshot as ``Divider.divide`` does; ``divider`` has divided those before."""
    return (divider or Divider()).divide(pieces, owned, earned, known)


def _lying_in(blocks: Collection[tuple[int, int]], addresses: Sequence[int], private: Sequence[bool]) -> set[int]:
    """Return the indexes of the pieces that begin in one of these memory blocks, but for private ones."""
    if not blocks:
        return set()
    merged = _merge(sorted(blocks))
    begins = [begin for begin, _ in merged]
    found: set[int] = set()
    for index, address in enumerate(addresses):
        at = bisect.bisect_right(begins, address) - 1
        if not private[index] and at >= 0 and address < merged[at][1]:
            found.add(index)
    return found


def _block(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor's memory block, and the one behind its last byte."""
    storage = tensor.untyped_storage()
    begin = storage.data_ptr()
    return begin, begin + storage.nbytes()
