"""Decides which tensors may be copied while training goes on: those whose memory a watched optimizer owns."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from asyncckpt.stage.live_bytes import local_part
from asyncckpt.types import LocalTensor

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


class OwnedMemory:
    """Collects the byte ranges that nothing but the update of a watched optimizer changes."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # of contiguous tensors, by address
        self._others: list[tuple[int, int]] = []
        #: The tensors that were added, as the optimizer holds them.
        self.holders: list[torch.Tensor] = []
        self._begins: list[int] = []
        self._by_begin: dict[int, torch.Tensor] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        sizes = self._sizes
        for tensor in tensors:
            self.holders.append(tensor)
            here = local_part(tensor)
            if here.is_contiguous():
                begin, nbytes = here.data_ptr(), here.nbytes
                self._by_begin[begin] = tensor
                if sizes.get(begin, -1) < nbytes:
                    sizes[begin] = nbytes
            elif _is_dense(here):  # what lies in the gaps of others belongs to somebody else
                self._others.append(_span(here))
                self._by_begin[here.data_ptr()] = tensor

    def holder_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor, as the optimizer holds it, in whose memory this one begins; None where there is none."""
        exact = self._by_begin.get(tensor.data_ptr())
        if exact is not None:
            return exact
        if not self._begins:
            self._begins = sorted(self._by_begin)
        at = bisect.bisect_right(self._begins, tensor.data_ptr()) - 1
        if at < 0:
            return None
        found = self._by_begin[self._begins[at]]
        same_block = local_part(found).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return found if same_block else None

    def not_covered(self, pieces: Sequence[LocalTensor]) -> list[torch.Tensor]:
        """Return the tensors of those pieces that do not lie wholly in owned ranges."""
        size_at = self._sizes.get
        doubtful = [
            tensor
            for piece in pieces
            if size_at((tensor := piece.tensor).data_ptr()) != tensor.nbytes or not tensor.is_contiguous()
        ]
        uncovered = [tensor for tensor in doubtful if self._is_apart(tensor)]  # buffers
        if len(uncovered) == len(doubtful):
            return uncovered
        whole = ((address, address + nbytes) for address, nbytes in self._sizes.items())
        ranges = _merge(sorted([*whole, *self._others]))
        return [tensor for tensor in doubtful if not _lies_in(*_span(tensor), ranges)]

    def _is_apart(self, tensor: torch.Tensor) -> bool:
        """Whether nothing owned covers a tensor for sure, because it begins where its memory block does. False says
        nothing."""
        address = tensor.data_ptr()
        return address not in self._sizes and not self._others and address == _block(tensor)[0] != 0


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
    might be deferred once a step has shown that nothing else changes them."""

    eager: set[int]
    deferred: list[int]
    on_trial: Mapping[int, torch.Tensor]


#: The memory of tensors on these devices can be compared with what was staged.
_TRIED_DEVICES = frozenset({"cpu", "cuda"})


def divide(pieces: Sequence[LocalTensor], owned: OwnedMemory, earned: Collection[int] | None = None) -> Division:
    """Decide which pieces are copied when. Small pieces that would have to be staged at once are cloned, in ``pieces``
    itself. ``earned``: the indexes of those that may be deferred at all; None for every one.

    A piece is deferred only where all pieces in its memory block lie in owned ranges and none of them is a frozen
    parameter, under whatever name: flattened modules share one block, and one write may change more of it than one
    tensor.
    """
    at_once = _may_change_any_time(pieces, owned)
    if not at_once and (earned is None or len(earned) == len(pieces)):
        return Division(set(), list(range(len(pieces))), {})
    deferred: list[int] = []
    on_trial: dict[int, torch.Tensor] = {}
    now: list[int] = []
    for index, piece in enumerate(pieces):
        if index in at_once:
            now.append(index)
        elif earned is None or index in earned or piece.private or not piece.tensor.numel():
            deferred.append(index)
        else:
            now.append(index)
            tensor = piece.tensor
            if tensor.device.type in _TRIED_DEVICES and not tensor.is_conj() and not tensor.is_neg():
                on_trial[index] = tensor
    eager: set[int] = set()
    cloned = 0
    for index in now:
        piece = pieces[index]
        nbytes = piece.spec.nbytes
        # a clone saves nothing where all extents are staged now
        if deferred and nbytes <= _CLONE_BELOW_BYTES and cloned + nbytes <= _CLONE_TOTAL_BYTES:
            piece.tensor = piece.tensor.detach().clone()
            cloned += nbytes
        else:
            eager.add(index)
    return Division(eager, deferred, on_trial)


def _may_change_any_time(pieces: Sequence[LocalTensor], owned: OwnedMemory) -> set[int]:
    """Return the indexes of the pieces that something else than the update of a watched optimizer may change."""
    ours = [piece for piece in pieces if not piece.private and not piece.spec.frozen]
    frozen = [piece.tensor for piece in pieces if piece.spec.frozen and not piece.private]
    blocks = _merge(sorted({_block(tensor) for tensor in [*owned.not_covered(ours), *frozen]}))
    if not blocks:
        return set()
    begins = [begin for begin, _ in blocks]
    found: set[int] = set()
    for index, piece in enumerate(pieces):
        address = piece.tensor.data_ptr()
        at = bisect.bisect_right(begins, address) - 1
        if not piece.private and at >= 0 and address < blocks[at][1]:
            found.add(index)
    return found


def _block(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor's memory block, and the one behind its last byte."""
    storage = tensor.untyped_storage()
    begin = storage.data_ptr()
    return begin, begin + storage.nbytes()
