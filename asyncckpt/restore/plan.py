"""What of a checkpoint would go where in the live state, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.read.scatter import Window
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor, receiver
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.types import JsonValue


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the caller of ``restore`` chose: ``device`` for tensors not living yet, ``dtype`` for floating ones."""

    device: torch.device
    dtype: torch.dtype | None
    selected: Callable[[str], bool]


@dataclass(slots=True)
class Plan:
    """``fill``: stored tensor → live tensors that take its values. ``finish`` runs after they are filled. ``used``:
    tensors that a tree refers to, each at most once."""

    fill: list[tuple[StoredTensor, list[Window]]] = field(default_factory=list)
    finish: list[Callable[[], None]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def take(self, record: StoredTensor, value: Any, where: str) -> None:
        """``value`` takes the stored tensor, or, where ranks hold it together, this rank's part of it."""
        if not is_distributed(value) and not is_sharded_tensor(value):
            self.fill.append((record, [Window(value)]))
            return
        part = receiver(value, where)
        self.fill.append((record, [Window(part.tensor, part.first)]))
        if part.finish is not None:
            self.finish.append(part.finish)

    def merge(self, other: Plan) -> None:
        self.fill += other.fill
        self.finish += other.finish
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.mismatched += other.mismatched


#: Stored tensors by qualified live name (``model.wte.weight``), after the rename map.
Stored = Mapping[str, StoredTensor]


def decode(component: str, tree: JsonValue, stored: Stored, plan: Plan, opts: Options) -> Any:
    """A decoded tree with new tensors that ``plan`` fills; arrays lie in host memory, whatever the device."""
    return jsontree.decode(tree, new_tensors(component, stored, plan, opts), on_host(component, stored, plan))


def on_host(component: str, stored: Stored, plan: Plan) -> Callable[[str], torch.Tensor]:
    """As ``new_tensors``, in host memory and with the stored dtype, whatever the caller of ``restore`` chose."""
    host = Options(device=torch.device("cpu"), dtype=None, selected=lambda _name: True)
    return new_tensors(component, stored, plan, host)


def new_tensors(component: str, stored: Stored, plan: Plan, opts: Options) -> Callable[[str], torch.Tensor]:
    """A key in a tree → a new tensor on ``opts.device`` that ``plan`` fills. What it gives raises as ``lookup``
    and ``new_tensor``."""

    def get(key: str) -> torch.Tensor:
        record = lookup(component, key, stored, plan)
        tensor = new_tensor(record, DTYPES[record.dtype], opts.device)
        plan.fill.append((record, [Window(tensor)]))
        return tensor

    return get


def new_tensor(record: StoredTensor, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
    """Memory for a stored tensor. Raises ``CheckpointDamaged`` for a shape that torch cannot have, ``MemoryError``."""
    try:
        return torch.empty(record.shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = f"a tensor of shape {list(record.shape)} and {record.nbytes} bytes cannot be made ({error})"
        if not record.nbytes:
            raise CheckpointDamaged(problem) from error
        raise MemoryError(problem) from error


def mismatch(name: str, record: StoredTensor, live: torch.Tensor, opts: Options) -> str | None:
    """Why the stored tensor cannot go into the live one, or None."""
    if record.shape != tuple(live.shape):
        return f"{name}: saved with shape {list(record.shape)}, live {list(live.shape)}"
    saved = DTYPES[record.dtype]
    if saved == live.dtype:
        return None
    wanted = opts.dtype if live.is_floating_point() and saved.is_floating_point else None
    if wanted is not None and (live.is_meta or live.dtype == wanted):
        return None
    return f"{name}: saved as {saved}, live {live.dtype} (restore(..., dtype={live.dtype}) converts)"


def lookup(component: str, key: str, stored: Stored, plan: Plan) -> StoredTensor:
    """What a tree refers to. Raises ``CheckpointDamaged`` where there is none, or it was referred to before."""
    record = stored.get(f"{component}.{key}")
    if record is None:
        raise CheckpointDamaged(f"state.json refers to tensor {component}.{key:.80}, which the manifest does not list")
    if key in plan.used:  # thirty characters that would cost the tensor's memory each time
        raise CheckpointDamaged(f"state.json refers to tensor {component}.{key:.80} twice")
    plan.used.add(key)
    return record


def qualified_records(components: Mapping[str, ComponentRecord]) -> Iterable[tuple[str, StoredTensor]]:
    """Every stored tensor under each of its names (a tied tensor's aliases too), as ``component.fqn``."""
    for component, record in components.items():
        for fqn, tensor in record.tensors.items():
            yield f"{component}.{fqn}", tensor
        for alias, target in record.aliases.items():
            yield f"{component}.{alias}", record.tensors[target]
