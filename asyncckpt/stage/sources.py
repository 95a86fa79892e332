"""What is copied while training goes on is the memory that tensors had at the save, whatever they have now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncckpt.state.known_state import KnownState, Recaptured
from asyncckpt.types import Extent


class Sources:
    """Gives the copies of one save their tensors, where the snapshot has a module's own instead of aliases of them: an
    assignment to ``.data`` would change these. Thread-safe, as long as an extent is copied by one thread.

    ``tensors``: of all pieces, which the copies take; an alias takes the place of each until it was copied.
    """

    def __init__(self, known: KnownState, again: Recaptured) -> None:
        self._addresses = known.addresses
        self._forms = known.forms
        self._numbers = known.tensor_of_piece
        self._storages = again.storages
        self._live = again.tensors
        self._tensors = again.pieces.tensors

    def take(self, extent: Extent, copied_later: frozenset[int]) -> None:
        """Put aliases in the place of those of an extent's tensors that are copied after ``save`` has returned."""
        for piece in self._pieces(extent, copied_later):
            number = self._numbers[piece]
            alias = self._live[number].detach()
            dtype, shape, stride = self._forms[number]
            if (
                alias.data_ptr() != self._addresses[number]
                or alias.dtype != dtype
                or alias.shape != shape
                or alias.stride() != stride
            ):
                alias = self._as_it_was(number)
            self._tensors[piece] = alias

    def give_back(self, extent: Extent, copied_later: frozenset[int]) -> None:
        """Let the aliases of an extent go, which is copied."""
        for piece in self._pieces(extent, copied_later):
            self._tensors[piece] = self._live[self._numbers[piece]]

    def _pieces(self, extent: Extent, copied_later: frozenset[int]) -> list[int]:
        held, numbers = len(self._storages), self._numbers
        return [
            segment.piece
            for segment in extent.segments
            if -1 < numbers[segment.piece] < held and segment.piece in copied_later
        ]

    def _as_it_was(self, number: int) -> torch.Tensor:
        """Return a view of the memory that a tensor had, which is kept. Where the memory itself was resized, whoever
        compares addresses sees that."""
        dtype, shape, stride = self._forms[number]
        storage = self._storages[number]
        view = torch.empty(0, dtype=dtype, device=storage.device)
        offset = self._addresses[number] - storage.data_ptr()
        try:
            return view.set_(storage, offset // dtype.itemsize, shape, stride)
        except RuntimeError:
            return view


def numbers_of(pieces: Sequence[int], known: KnownState) -> list[int]:
    """Return the numbers of these pieces' tensors among those that are known, each once, in order."""
    return sorted({known.tensor_of_piece[piece] for piece in pieces})
