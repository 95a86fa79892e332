"""Whether tensors are still the same objects, of the same form and at the same place, is found out without making an
object for any of them."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from asyncckpt.state.wrappers import PLAIN_TYPES

#: So many tensors are looked at from all sides before the next ones: their memory stays in the processor's cache.
_AT_ONCE = 64

_data_ptr: Callable[[Any], int] = torch.Tensor.data_ptr
_version: Callable[[Any], int] = operator.attrgetter("_version")
_storage: Callable[[Any], torch.UntypedStorage] = torch.Tensor.untyped_storage


class _Forms(Protocol):
    """Knows the type, dtype, device, shape, strides and ``requires_grad`` of some tensors."""

    def check(self, *tensors: torch.Tensor) -> bool:
        """Whether these tensors have the same, in the same order."""


class _PythonForms:
    """Does what torch's guards do, where torch has none: five times as slow."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._forms = _forms(tensors)

    def check(self, *tensors: torch.Tensor) -> bool:
        return _forms(tensors) == self._forms


def _forms(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [
        (type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_conj(), t.is_neg()) for t in tensors
    ]


@functools.cache
def _guards() -> Callable[..., _Forms]:
    """Return what makes ``_Forms``: torch's own guards in C++, with which compiled functions recognise arguments."""
    try:
        found: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards

        def make(*tensors: torch.Tensor) -> _Forms:
            forms: _Forms = found(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            return forms

        # whoever vouches for a form has to see each part of it change
        for before, after in (
            (torch.zeros(2, 3), torch.zeros(3, 2)),
            (torch.zeros(2, 2), torch.zeros(2, 2).t()),
            (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
            (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
            (torch.zeros(2), torch.zeros(2, requires_grad=True)),
            (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64).conj()),
        ):
            if not make(before).check(before) or make(before).check(after):
                return _PythonForms
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return _PythonForms
    return make


class KnownTensors:
    """Knows different plain tensors, in their order, and keeps none of them alive. For the training thread.

    What is known of each is its identity, its type, dtype, device, shape, strides and ``requires_grad``, and the
    address of its first byte. An identity can be that of a new tensor, where the known one is gone; then the rest says
    whether that makes a difference.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.ids = list(map(id, tensors))
        self.addresses = list(map(_data_ptr, tensors))
        parts = [tensors[begin : begin + _AT_ONCE] for begin in range(0, len(tensors), _AT_ONCE)]
        make = _guards()
        self._parts = [(make(*part), list(map(_data_ptr, part))) for part in parts]

    def read(self, tensors: Sequence[torch.Tensor], held: int) -> tuple[list[int], list[torch.UntypedStorage]] | None:
        """Return torch's counts of in-place changes of these tensors, and the memory blocks of the first ``held`` of
        them; None where they are not those that are known, as they are known."""
        versions: list[int] = []
        storages: list[torch.UntypedStorage] = []
        begin = 0
        for forms, addresses in self._parts:
            part = tensors[begin : begin + _AT_ONCE]
            if not forms.check(*part) or list(map(_data_ptr, part)) != addresses:
                return None
            versions += map(_version, part)
            if begin < held:
                storages += map(_storage, part[: held - begin])
            begin += _AT_ONCE
        return versions, storages


def can_be_known(tensors: Sequence[Any]) -> bool:
    """Whether ``KnownTensors`` can know all of these values."""
    return set(map(type, tensors)) <= PLAIN_TYPES and all(
        one.layout is torch.strided and not one.is_meta and not one.is_inference() for one in tensors
    )
