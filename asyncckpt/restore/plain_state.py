"""The state of most parameters is a flat dict of tensors that go where they were, or into new ones of their shapes.

Nothing has to be decided or decoded for such a parameter, and a model may have ten thousands of them. Whatever is not
of this kind, or does not fit, is left to ``optimizer_state``, which says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.read.scatter import Window
from asyncckpt.restore.plan import LiveTarget, Options, RestorePlan, new_tensor
from asyncckpt.restore.saved_parameters import SavedParameter
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.wrappers import PLAIN_TYPES
from asyncckpt.types import JsonValue


def fits_in_place(record: StoredTensor, live: Any) -> bool:
    """Return whether a live tensor is a plain one that takes a stored tensor as it is: of the same shape and dtype, and
    row-major. False where more has to be looked at."""
    return (
        type(live) in PLAIN_TYPES
        and live.dtype is DTYPES[record.dtype]
        and live.shape == record.shape
        and live.layout is torch.strided
        and not live.is_meta
        and live.is_contiguous()
    )


class PlainStates:
    """``PlainStates`` plans such states of the optimizer that is called ``name``, whose stored record is
    ``component``."""

    def __init__(self, name: str, component: ComponentRecord, opts: Options) -> None:
        self._name = name
        self._component = component
        #: State that was not row-major may lie otherwise now, and ``dtype`` may convert it.
        self._applies = not component.strides and opts.dtype is None
        self._on_host = torch.device("cpu")

    def plan(
        self,
        label: str,
        parameter: torch.Tensor,
        saved: SavedParameter | None,
        tree: JsonValue,
        live: Any,
        group: Mapping[str, Any],
        plan: RestorePlan,
    ) -> dict[str, torch.Tensor] | None:
        """Add the state of one parameter to ``plan`` and return it, or change nothing and return None where it is of
        another kind. ``label``: its stored name. ``tree``: its stored state. ``live``: its state now. ``group``: the
        hyperparameters that it will have. Raises as ``new_tensor`` does."""
        if not self._applies or type(tree) is not dict or not tree or not _is_row_major(parameter, saved):
            return None
        new = live is None or (type(live) is dict and not live)
        if not new and (type(live) is not dict or list(live) != list(tree)):
            return None
        tensors = self._component.tensors
        records: list[tuple[str, str, StoredTensor]] = []
        for key, node in tree.items():
            stored = f"state.{label}.{key}"
            if type(node) is not dict or len(node) != 2 or node.get("$") != "tensor" or node.get("v") != stored:
                return None
            record = tensors.get(stored)
            if record is None or stored in plan.used or not (new or fits_in_place(record, live[key])):
                return None
            records.append((key, stored, record))
        plan.used.update(stored for _, stored, _ in records)
        if not new:
            where = self._name
            plan.fill += [LiveTarget(record, Window(live[key]), f"{where}.{stored}") for key, stored, record in records]
            return {key: live[key] for key, _, _ in records}
        on_device = group.get("capturable") or group.get("fused")
        made: dict[str, torch.Tensor] = {}
        for key, _, record in records:
            device = parameter.device if on_device or key != "step" else self._on_host
            made[key] = new_tensor(record, DTYPES[record.dtype], device)
        plan.read += [(record, [Window(made[key])]) for key, _, record in records]
        return made


def _is_row_major(parameter: torch.Tensor, saved: SavedParameter | None) -> bool:
    """Return whether a plain parameter is row-major, and was when it was saved, as far as that is known."""
    return (
        type(parameter) in PLAIN_TYPES
        and not parameter.is_meta
        and parameter.layout is torch.strided
        and parameter.is_contiguous()
        and (saved is None or saved.strides is None or saved.strides == parameter.stride())
    )
