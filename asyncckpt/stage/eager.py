"""Decides which tensors may be copied while training goes on: those whose memory a watched optimizer owns."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from asyncckpt.types import LocalTensor

#: Small tensors that could change in the forward pass are cloned instead of staged at once: a buffer in every extent
#: would otherwise make ``save`` wait for the whole arena.
_CLONE_BELOW_BYTES = 1 << 20
_CLONE_TOTAL_BYTES = 16 << 20


def storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return the addresses of the memory blocks behind the tensors; for a DTensor, behind the part that is here."""
    return {getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr() for tensor in tensors}


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

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        sizes = self._sizes
        for tensor in tensors:
            here = getattr(tensor, "_local_tensor", tensor)
            if here.is_contiguous():
                begin, nbytes = here.data_ptr(), here.nbytes
                if sizes.get(begin, -1) < nbytes:
                    sizes[begin] = nbytes
            elif _is_dense(here):  # what lies in the gaps of others belongs to somebody else
                self._others.append(_span(here))

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
    """``eager``: indexes of the pieces that must be staged before ``save`` returns. ``deferred``: the tensors that
    may be copied until the update that changes them."""

    eager: set[int]
    deferred: list[torch.Tensor]


def divide(pieces: Sequence[LocalTensor], owned: OwnedMemory) -> Division:
    """Decide which pieces are copied when. Small pieces that would have to be staged at once are cloned, in ``pieces``
    itself.

    A piece is deferred only where all pieces in its memory block lie in owned ranges and none of them is a frozen
    parameter, under whatever name: flattened modules share one block, and one write may change more of it than one
    tensor.
    """
    ours = [piece for piece in pieces if not piece.private and not piece.spec.frozen]
    frozen = [piece.tensor for piece in pieces if piece.spec.frozen and not piece.private]
    blocks = _merge(sorted({_block(tensor) for tensor in [*owned.not_covered(ours), *frozen]}))
    if not blocks:
        return Division(set(), [piece.tensor for piece in pieces])
    begins = [begin for begin, _ in blocks]
    eager: set[int] = set()
    deferred: list[torch.Tensor] = []
    cloned = 0
    for index, piece in enumerate(pieces):
        address = piece.tensor.data_ptr()
        at = bisect.bisect_right(begins, address) - 1
        if piece.private or at < 0 or address >= blocks[at][1]:
            deferred.append(piece.tensor)
            continue
        nbytes = piece.spec.nbytes
        if nbytes <= _CLONE_BELOW_BYTES and cloned + nbytes <= _CLONE_TOTAL_BYTES:
            piece.tensor = piece.tensor.detach().clone()
            cloned += nbytes
        else:
            eager.add(index)
    return Division(eager, deferred)


def _block(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor's memory block, and the one behind its last byte."""
    storage = tensor.untyped_storage()
    begin = storage.data_ptr()
    return begin, begin + storage.nbytes()
