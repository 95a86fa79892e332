"""Live tensors that share memory take their stored values only where all of these can stand side by side.

Weights that are tied live, and were not tied when they were saved, are the usual case. Reader threads that filled both
would leave a mixture. So their values are read into memory of their own first, tried there, and written one after the
other; where they contradict each other nothing has been changed yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch

from asyncckpt.errors import StateMismatch
from asyncckpt.memory.tensor_bytes import may_overlap
from asyncckpt.read.scatter import Window
from asyncckpt.restore.live_memory import span_bytes
from asyncckpt.restore.plan import LiveTarget, RestorePlan, same_bits

_ALIGNMENT_BYTES = 64


def separate(plans: Sequence[RestorePlan]) -> None:
    """Change plans so that no two reads write to the same memory. Values of tensors that share memory are compared
    once they are read (``RestorePlan.checks``). Of plans that are carried out one after the other, give the first
    first."""
    moved: set[int] = set()
    for group in _groups((target, plan) for plan in plans for target in plan.fill if target.window.tensor.numel()):
        first = group[0][0]
        overlaps = may_overlap(first.window.tensor)
        if len(group) == 1 and not overlaps:
            continue
        if not overlaps and all(_is_same(target, first) for target, _ in group):  # it is read once
            first.also = [*first.also, *(target.where for target, _ in group[1:])]
            moved.update(id(target) for target, _ in group[1:])
            continue
        moved.update(id(target) for target, _ in group)
        values: list[tuple[LiveTarget, torch.Tensor]] = []
        for target, plan in group:
            live = target.window.tensor
            apart = torch.empty(live.shape, dtype=live.dtype, device=live.device)
            values.append((target, apart))
            plan.read.append((target.record, [Window(apart, target.window.first)]))
            plan.place.append(functools.partial(_write, live.detach(), apart))
        group[0][1].checks.append(functools.partial(_try, values))
    for plan in plans:
        plan.fill = [target for target in plan.fill if id(target) not in moved]


def _groups(
    targets: Iterable[tuple[LiveTarget, RestorePlan]],
) -> Iterator[list[tuple[LiveTarget, RestorePlan]]]:
    """Yield targets whose ranges of addresses touch each other, directly or through others, and those whose own
    elements share memory; in the order in which they were planned. What has memory of its own is not among them."""
    devices: dict[torch.device, list[tuple[LiveTarget, RestorePlan]]] = {}
    for entry in targets:
        devices.setdefault(entry[0].window.tensor.device, []).append(entry)
    for entries in devices.values():
        tensors = [target.window.tensor for target, _ in entries]
        begins = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)
        spans = np.array([span_bytes(tensor) for tensor in tensors], dtype=np.uint64)
        order = np.argsort(begins, kind="stable")
        ends = np.maximum.accumulate((begins + spans)[order])
        group = np.concatenate(([0], np.cumsum(begins[order][1:] >= ends[:-1])))
        several = np.bincount(group)[group] > 1
        members: dict[int, list[int]] = {}
        for place, number in zip(group[several].tolist(), order[several].tolist(), strict=True):
            members.setdefault(place, []).append(number)
        alone = np.ones(len(entries), dtype=bool)
        alone[order[several]] = False
        for number in np.flatnonzero(alone).tolist():
            if not tensors[number].is_contiguous() and may_overlap(tensors[number]):
                yield [entries[number]]
        for numbers in members.values():
            yield [entries[number] for number in sorted(numbers)]


def _is_same(one: LiveTarget, other: LiveTarget) -> bool:
    """Return whether two targets are one: the same memory takes the same part of the same record."""
    a, b = one.window.tensor, other.window.tensor
    return (
        one.record is other.record
        and one.window.first == other.window.first
        and a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _try(values: Sequence[tuple[LiveTarget, torch.Tensor]]) -> None:
    """Write all values to memory that is shared as the live one is, and see whether all of them are there then. Raises
    ``StateMismatch``."""
    begin = min(target.window.tensor.data_ptr() for target, _ in values) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
    end = max(target.window.tensor.data_ptr() + span_bytes(target.window.tensor) for target, _ in values)
    whole = -(-(end - begin) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    memory = torch.zeros(whole, dtype=torch.uint8, device=values[0][1].device)
    trials = [(target, value, _view(memory, target, begin)) for target, value in values]
    for _, value, trial in trials:
        _write(trial, value)
    wrong = [target.where for target, value, trial in trials if not same_bits(trial, value)]
    if not wrong:
        return
    others = list(dict.fromkeys(target.where for target, _ in values if target.where != wrong[0]))
    if others:
        raise_shared(wrong[0], others)
    problem = (
        f"{wrong[0]}: elements of the live tensor share memory (it was made by expand() or the like), and different "
        f"values were saved for them. Make it a tensor of its own: .clone()"
    )
    raise StateMismatch(problem, mismatched=[problem])


def raise_shared(name: str, others: Sequence[str]) -> NoReturn:
    """Refuse values for a live tensor that shares its memory with others, for which different ones were saved."""
    problem = (
        f"{name}: shares its memory with {', '.join(others)} in the live state (tied weights, or views of one "
        f"tensor), and different values were saved for them. Make it a tensor of its own, or drop one of the stored "
        f"ones: restore(state, rename=lambda name: None if name == {name!r} else name)"
    )
    raise StateMismatch(problem, mismatched=[problem])


def _view(memory: torch.Tensor, target: LiveTarget, begin: int) -> torch.Tensor:
    """Return the tensor that lies in ``memory`` as the live one lies in the memory that begins at ``begin``."""
    live = target.window.tensor
    offset, odd = divmod(live.data_ptr() - begin, live.element_size())
    if odd:
        problem = f"{target.where}: shares its memory with another tensor, and is not aligned. Give it memory: .clone()"
        raise StateMismatch(problem, mismatched=[problem])
    return memory.view(live.dtype).as_strided(live.shape, live.stride(), offset)


def _write(live: torch.Tensor, values: torch.Tensor) -> None:
    """Give a live tensor the values of a dense one of its shape, also where several of its elements share a place."""
    if not may_overlap(live):
        live.copy_(values)
        return
    span = span_bytes(live) // live.element_size()
    places = torch.arange(span, device=live.device).as_strided(live.shape, live.stride()).reshape(-1)
    live.as_strided((span,), (1,))[places] = values.reshape(-1)
