"""``KnownState`` knows a training state that was captured, and captures it again without a look at a name: it compares
who and where the tensors are, and reads plain values anew."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncckpt.state.capture import check_state, other_component
from asyncckpt.state.known_modules import KnownModule, NotVouched
from asyncckpt.state.known_optimizers import KnownOptimizer
from asyncckpt.state.known_tensors import KnownTensors, can_be_known
from asyncckpt.state.markers import without_owners
from asyncckpt.types import ComponentSnapshot, LocalTensor, Pieces, Snapshot, TensorSpec, pieces_of

Picker = Callable[[Sequence[Any]], Sequence[Any]]


def picker(positions: Sequence[int], count: int = -1) -> Picker:
    """Return a function that takes the items at these positions, in order, out of a list or tuple, of which there are
    ``count``, where that is known."""
    if len(positions) == count and list(positions) == list(range(count)):
        return lambda items: items
    if len(positions) > 1:
        found: Picker = operator.itemgetter(*positions)
        return found
    return lambda items: tuple(items[position] for position in positions)


@dataclass(frozen=True, slots=True)
class Recaptured:
    """A known state that was captured again. ``pieces``: of all components, in order. ``is_same``: all specifications
    are those that are known, and nothing but known tensors is in it. ``tensors``: the known ones, each once; the memory
    blocks of those at the beginning, which modules hold, are ``storages``: as long as they are kept, an assignment to
    ``.data`` cannot give that memory to others. ``versions``: torch's counts of their in-place changes."""

    snapshot: Snapshot
    pieces: Pieces
    is_same: bool
    tensors: Sequence[torch.Tensor]
    versions: list[int]
    storages: list[torch.UntypedStorage]
    optimizers: Sequence[torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What stays of a component. ``known``: None where it is captured each time. ``pick``: takes the tensors of its
    pieces out of all known ones."""

    snapshot: ComponentSnapshot
    known: KnownModule | KnownOptimizer | None
    pick: Picker
    specs: list[TensorSpec]
    first_only: list[bool]


class KnownState:
    """Knows the state that ``snapshot`` was captured of, and keeps nothing of it alive. For the training thread.

    Raises ``NotVouched``, with the component's name in ``component``, where one cannot be known or nothing could be won
    by it.
    """

    def __init__(self, state: Mapping[str, Any], snapshot: Snapshot, *, weights_only: bool) -> None:
        self._weights_only = weights_only
        bare, self._owners = self._chosen(state)
        self._names = list(bare)
        found: dict[str, KnownModule | KnownOptimizer] = {}
        modules = [one for one in snapshot.components if isinstance(bare[one.name], nn.Module)]
        optimizers = [one for one in snapshot.components if isinstance(bare[one.name], torch.optim.Optimizer)]
        values: list[Any] = []
        begins: dict[str, int] = {}
        held = 0
        for one in snapshot.components:
            with _named(one.name):
                for piece in one.pieces:
                    _check_plain(piece)
        for one in [*modules, *optimizers]:
            with _named(one.name):
                value = bare[one.name]
                known = KnownOptimizer(one.name, value, one) if one.kind == "optimizer" else KnownModule(value, one)
                found[one.name] = known
                begins[one.name] = len(values)
                values += known.values(value)
            if isinstance(known, KnownModule):
                held = len(values)
        if not values:
            raise NotVouched("there is no module and no optimizer in it")
        self._order = list(found)
        self._kinds = {name: type(bare[name]) for name in self._order}
        #: All but buffers that are not stored are compared.
        skipped = {
            begins[n] + at for n, known in found.items() if isinstance(known, KnownModule) for at in known.skipped
        }
        compared = [at for at in range(len(values)) if at not in skipped]
        self._compared = picker(compared, len(values))
        of_interest = self._compared(values)
        self._ids = list(map(id, of_interest))
        first: dict[int, int] = {}
        for at, value in zip(compared, of_interest, strict=True):
            if value is not None:
                first.setdefault(id(value), at)
        unique = list(first.values())
        self._unique = picker(unique, len(values))
        self._held = sum(at < held for at in unique)
        different = self._unique(values)
        if not can_be_known(different):
            raise NotVouched("it has tensors of a class or a layout of their own")
        self._check_parameters(bare, found, first, held)
        self._tensors = KnownTensors(different)
        #: Where each tensor stands among the known ones, by its identity.
        self.numbers = {identity: number for number, identity in enumerate(self._tensors.ids)}
        self.addresses = self._tensors.addresses
        #: The forms of what modules hold.
        self.forms = [(one.dtype, one.shape, one.stride()) for one in different[: self._held]]
        #: For each piece the number of its tensor among the known ones, -1 where it is captured each time.
        self.tensor_of_piece: list[int] = []
        self._kept: list[_Kept] = []
        for one in snapshot.components:
            what = found.get(one.name)
            places = [self.numbers[id(values[begins[one.name] + at])] for at in what.positions] if what else []
            loose = len(one.pieces) - len(places)
            self.tensor_of_piece += [*places, *[-1] * loose]
            mine = one.pieces[: len(places)]  # what comes after them is captured each time
            specs, marks = [piece.spec for piece in mine], [piece.first_only for piece in mine]
            self._kept.append(_Kept(replace(one, pieces=[], tree=None), what, picker(places), specs, marks))
        self._is_settled = -1 not in self.tensor_of_piece
        self._specs = [spec for kept in self._kept for spec in kept.specs]
        self._first_only = [mark for kept in self._kept for mark in kept.first_only]
        #: What other stages have found out about this state, and need not find out again.
        self.cache: dict[str, Any] = {}

    def _chosen(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        bare, owners = without_owners(state)
        if self._weights_only:
            bare = {name: value for name, value in bare.items() if isinstance(value, nn.Module)}
        return bare, owners

    def _check_parameters(
        self, bare: Mapping[str, Any], found: Mapping[str, Any], first: Mapping[int, int], held: int
    ) -> None:
        for name, known in found.items():
            if isinstance(known, KnownOptimizer):
                for parameter in known.parameters(bare[name]):
                    if first.get(id(parameter), held) >= held:
                        raise _about(name, NotVouched("it has parameters that no module in the state holds"))

    @torch.no_grad()
    def again(self, state: Mapping[str, Any], step: int) -> Recaptured:
        """Capture the state again. Raises ``NotVouched`` where it is not known any more, and as ``capture`` does."""
        check_state(state)
        bare, owners = self._chosen(state)
        if list(bare) != self._names or owners != self._owners:
            raise NotVouched("it has other components")
        values: list[Any] = []
        for name, known in ((kept.snapshot.name, kept.known) for kept in self._kept):
            if known is not None and type(bare[name]) is not self._kinds[name]:
                raise _about(name, NotVouched("it is an object of another class"))
        by_name = {kept.snapshot.name: kept.known for kept in self._kept}
        for name in self._order:
            known = by_name[name]
            if known is not None:
                with _named(name):
                    values += known.values(bare[name])
        if list(map(id, self._compared(values))) != self._ids:
            raise NotVouched("other tensors have taken the place of some")
        tensors = self._unique(values)
        read = self._tensors.read(tensors, self._held)
        if read is None:
            raise NotVouched("tensors have another shape, dtype or place in memory, or were frozen")
        components: list[ComponentSnapshot] = []
        everything: list[torch.Tensor] = []
        parts: list[Pieces] = []
        changing = False
        for kept in self._kept:
            made, loose = self._component(kept, bare[kept.snapshot.name], tensors)
            made.shared = made.shared or made.name in owners
            changing = changing or bool(loose)
            components.append(made)
            parts.append(pieces_of(made.pieces))
            everything += parts[-1].tensors
        if changing:
            specs = [spec for part in parts for spec in part.specs]
            marks = [mark for part in parts for mark in part.first_only]
            pieces = Pieces(specs, marks, everything)
        else:
            pieces = Pieces(self._specs, self._first_only, everything)
        versions, storages = read
        optimizers = [bare[name] for name in self._order if isinstance(bare[name], torch.optim.Optimizer)]
        is_same = self._is_settled and not changing
        return Recaptured(Snapshot(step, components), pieces, is_same, tensors, versions, storages, optimizers)

    def _component(
        self, kept: _Kept, value: Any, tensors: Sequence[torch.Tensor]
    ) -> tuple[ComponentSnapshot, Sequence[LocalTensor]]:
        """Capture one component again; return it, and those of its pieces that were not known."""
        one = kept.snapshot
        tree: Any = {}
        loose: Sequence[LocalTensor] = ()
        parameters: Sequence[Sequence[str]] = ()
        if kept.known is None:
            made = other_component(one.name, value)
            loose, made.owner = made.pieces, one.owner
        else:
            if isinstance(kept.known, KnownOptimizer):
                tree, loose, parameters = kept.known.tree(value)
            made = replace(one, tree=tree, parameters=parameters)
        found = list(kept.pick(tensors))
        if not loose:
            made.pieces = Pieces(kept.specs, kept.first_only, found)
            return made, loose
        for piece in loose:
            with _named(one.name):
                _check_plain(piece)
        made.pieces = Pieces(
            [*kept.specs, *(piece.spec for piece in loose)],
            [*kept.first_only, *(piece.first_only for piece in loose)],
            [*found, *(piece.tensor for piece in loose)],
        )
        return made, loose


def _check_plain(piece: LocalTensor) -> None:
    """Raise ``NotVouched`` for a piece that is more than a whole tensor of a plain class."""
    apart = piece.rows or piece.span or piece.gather or piece.redistribute
    if apart is not None or piece.private or piece.begin or piece.spec.file:
        raise NotVouched(f"its tensor {piece.spec.name!r} is a part of a larger one, or lies in a file of its own")


def _about(component: str, error: NotVouched) -> NotVouched:
    error.component = error.component or component
    return error


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Have a ``NotVouched`` that the body raises name the component."""
    try:
        yield
    except NotVouched as error:
        raise _about(component, error) from None
