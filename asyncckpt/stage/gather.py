"""Gathers a state's tensors into its image, on the device that they lie on.

Where Triton is there, one kernel reads a table of their addresses. Elsewhere one call of torch copies them into views
of their places. Table and views are made once and kept; what they rest on is compared at every save.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.region import address_of
from asyncckpt.memory.tensor_bytes import _copy_strided, is_plain
from asyncckpt.stage.copy import copy_segments
from asyncckpt.stage.image_plan import ImagePlan
from asyncckpt.stage.places import Places, places_of
from asyncckpt.types import Segment

log = logging.getLogger("asyncckpt")

#: Tensors of the host are sent to the device side by side, each at a multiple of so many bytes.
_GRAIN = 64
_is_neg: Callable[[torch.Tensor], bool] = torch.Tensor.is_neg
_is_conj: Callable[[torch.Tensor], bool] = torch.Tensor.is_conj
#: So many tensors go into one call. More objects at a time would have Python's collector run.
_AT_ONCE = 512


class Table(Protocol):
    """A table of addresses, on the device: see ``triton_gather.PointerTable``."""

    def launch(self) -> None: ...


MakeTable = Callable[[torch.Tensor, Sequence[int], Sequence[int], Sequence[int]], Table]


@functools.cache
def table_maker() -> MakeTable | None:
    """Return what makes tables for Triton's kernel; None where Triton is not installed. Imports Triton."""
    try:
        from asyncckpt.stage.triton_gather import PointerTable
    except Exception as error:  # whatever a broken installation raises, torch can copy too
        log.info("Triton cannot be used (%s): torch gathers the state on the device", error)
        return None
    return PointerTable


@dataclass(slots=True)
class _Known:
    """What was prepared, and for what: tensors that lie, and look, like this."""

    places: Places
    complex: list[int]
    #: Tensors of the host, by piece, where they lie on the device once they were sent.
    sent: dict[int, torch.Tensor]
    table: Table | None
    #: By dtype, whole tensors with their places, and parts of tensors.
    whole: list[tuple[list[int], list[torch.Tensor]]]
    parts: list[tuple[Segment, torch.Tensor]]
    negated: list[int] = field(default_factory=list)
    conjugated: list[int] = field(default_factory=list)
    vouched: object = None


class Gather:
    """Gathers states that have one plan. ``image``: the device's memory that the plan is for. ``lies_there``: whether a
    tensor lies on the device; any other is one of the host. Not thread-safe.

    ``enqueue`` has the copies made on the device's current stream. The tensors may change once they have run.
    """

    def __init__(
        self,
        plan: ImagePlan,
        image: torch.Tensor,
        lies_there: Callable[[torch.Tensor], bool],
        make_table: MakeTable | None = None,
    ) -> None:
        self.plan = plan
        self._image = image
        self._lies_there = lies_there
        self._make_table = make_table
        self._known: _Known | None = None
        #: Where the tensors of the host come to lie on the device, one after the other.
        self._here = image[:0]

    def enqueue(self, tensors: Sequence[torch.Tensor], vouched: object = None) -> None:
        """Enqueue the copies of the pieces, in order. Those of the host are read before this returns. ``vouched``: the
        same object as long as somebody has found that all pieces lie as they did, and look alike; None where nobody has
        looked."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside that mode, too
            known = self._prepared(tensors, vouched)
            given = self._with_those_of_the_host(tensors, known.sent) if known.sent else tensors
            if known.table is not None:
                known.table.launch()
            for indexes, targets in known.whole:
                for at in range(0, len(indexes), _AT_ONCE):
                    sources = [given[index] for index in indexes[at : at + _AT_ONCE]]
                    torch._foreach_copy_(targets[at : at + _AT_ONCE], sources, non_blocking=True)
            for segment, target in known.parts:
                _copy_part(given[segment.piece], segment, target)

    def _prepared(self, tensors: Sequence[torch.Tensor], vouched: object) -> _Known:
        """Return what is prepared for tensors that lie, and look, like these."""
        known = self._known
        negated = [index for index, one in enumerate(map(_is_neg, tensors)) if one]
        if known is not None and vouched is not None and known.vouched is vouched:
            # whoever vouches has not looked for these: a tensor's conjugate has its address, and its form
            conjugated = [index for index in known.complex if tensors[index].is_conj()]
            if (known.negated, known.conjugated) == (negated, conjugated):
                return known
        conjugated = [index for index, one in enumerate(map(_is_conj, tensors)) if one]
        places = places_of(tensors)
        if known is None or (known.negated, known.conjugated, known.places) != (negated, conjugated, places):
            known = self._known = self._prepare(tensors, places)
            known.negated, known.conjugated = negated, conjugated
        known.vouched = vouched
        return known

    def _prepare(self, tensors: Sequence[torch.Tensor], places: Places) -> _Known:
        of_host = [index for index, one in enumerate(tensors) if one.nbytes and not self._lies_there(one)]
        sent = self._places_on_device(of_host, tensors)
        table: list[tuple[int, int, int]] = []
        whole: dict[torch.dtype, tuple[list[int], list[torch.Tensor]]] = {}
        parts: list[tuple[Segment, torch.Tensor]] = []
        for segment in self.plan.segments:
            tensor = sent.get(segment.piece, tensors[segment.piece])
            place = self._image[segment.extent_offset : segment.extent_offset + segment.nbytes]
            if self._make_table is not None and is_plain(tensor):
                table.append((tensor.data_ptr() + segment.source_offset, segment.extent_offset, segment.nbytes))
            elif segment.nbytes == tensor.nbytes and segment.extent_offset % tensor.dtype.itemsize == 0:
                indexes, targets = whole.setdefault(tensor.dtype, ([], []))
                indexes.append(segment.piece)
                targets.append(place.view(tensor.dtype).view(tensor.shape))
            else:
                parts.append((segment, place))
        made = None
        if table and self._make_table is not None:
            addresses, begins, sizes = zip(*table, strict=True)
            made = self._make_table(self._image, addresses, begins, sizes)
        is_complex = [index for index, one in enumerate(tensors) if one.is_complex()]
        return _Known(places, is_complex, sent, made, list(whole.values()), parts)

    def _places_on_device(self, on_host: Sequence[int], tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        begins = [0]
        for index in on_host:
            begins.append(begins[-1] + -(-tensors[index].nbytes // _GRAIN) * _GRAIN)
        self._here = here = torch.empty(begins.pop(), dtype=torch.uint8, device=self._image.device)
        return {
            n: here[at : at + tensors[n].nbytes].view(tensors[n].dtype).view(tensors[n].shape)
            for n, at in zip(on_host, begins, strict=True)
        }

    def _with_those_of_the_host(
        self, tensors: Sequence[torch.Tensor], sent: Mapping[int, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Send the tensors of the host to the device in one piece, and return all tensors as they lie there."""
        here = self._here
        # each time anew: torch gives memory that a copy may still read to nobody
        way = torch.empty(len(here), dtype=torch.uint8, device="cpu", pin_memory=here.is_cuda)
        view = way.numpy().data
        slot = StagingBuffer(-1, 0, len(view), address_of(view), view)
        begin = here.data_ptr()
        copy_segments(tensors, [Segment(n, 0, to.data_ptr() - begin, to.nbytes) for n, to in sent.items()], slot)
        here.copy_(way, non_blocking=True)
        given = list(tensors)
        for index, tensor in sent.items():
            given[index] = tensor
        return given


def _copy_part(tensor: torch.Tensor, segment: Segment, place: torch.Tensor) -> None:
    """Copy a part of a tensor, or one whose place in the image is not one of its items."""
    if is_plain(tensor):
        place.copy_(
            tensor.reshape(-1).view(torch.uint8)[segment.source_offset : segment.source_offset + segment.nbytes]
        )
        return
    item = tensor.element_size()
    first, last = segment.source_offset // item, (segment.source_offset + segment.nbytes) // item
    if segment.extent_offset % item:
        part = torch.empty(last - first, dtype=tensor.dtype, device=tensor.device)
        _copy_strided(tensor, first, last, part)
        place.copy_(part.view(torch.uint8))
    else:
        _copy_strided(tensor, first, last, place.view(tensor.dtype))
