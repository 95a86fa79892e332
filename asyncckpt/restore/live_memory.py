"""Says whether a live tensor can take values, before anything is written to it."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor
from asyncckpt.state.wrappers import hides_values

NOT_INITIALISED: Final = (
    "not initialised yet: run the module once (one forward pass makes lazy parameters and buffers), then restore"
)


def refusal(tensor: Any) -> str | None:
    """Say why no stored values can go into this kind of tensor, or return None where they can. Looks at no shape, and
    works for tensors that have none."""
    if is_lazy(tensor):
        return NOT_INITIALISED
    if not isinstance(tensor, torch.Tensor) or is_distributed(tensor) or is_sharded_tensor(tensor):
        return None
    if hides_values(tensor):
        return (
            f"the live tensor is a {type(tensor).__name__}, which keeps its values in a form of its own. Restore "
            f"into the model as it was when it was saved, and convert it afterwards (quantize_, say)"
        )
    if tensor.layout is not torch.strided:
        return f"the live tensor has the layout {tensor.layout}; give it .to_dense() memory, and convert it afterwards"
    if tensor.is_quantized:
        return "the live tensor is quantized; restore into the model as it was when saved, and quantize it afterwards"
    return None


class Memory:
    """Knows which memory of the process can be written to. It is looked up once, when it is first asked."""

    def __init__(self) -> None:
        self._read_only: list[tuple[int, int]] | None = None

    def problems(self, tensors: Sequence[torch.Tensor]) -> dict[int, str]:
        """Return what ``problem`` says of those of the tensors that cannot be written to, by their numbers."""
        odd: list[int] = []
        begins: list[int] = []
        sizes: list[int] = []
        for number, tensor in enumerate(tensors):
            begin, size = tensor.data_ptr(), tensor.nbytes
            whole = begin and tensor.is_contiguous()
            if not whole or tensor.storage_offset() * tensor.itemsize + size > tensor.untyped_storage().nbytes():
                odd.append(number)
            on_host = tensor.is_cpu
            begins.append(begin if on_host else 0)
            sizes.append(size if on_host else 0)
        if len(odd) < len(tensors):
            first, last = np.array(self._unwritable(), dtype=np.uint64).reshape(-1, 2).T
            begin_of, end_of = np.array(begins, dtype=np.uint64), np.array(begins, dtype=np.uint64)
            end_of += np.array(sizes, dtype=np.uint64)
            # the ranges do not overlap, so that only those beside a tensor's beginning and end can meet it
            meets = np.searchsorted(last, begin_of, "right") < np.searchsorted(first, end_of, "left")
            odd += np.flatnonzero(meets).tolist()
        found = {number: self.problem(tensors[number]) for number in sorted(set(odd))}
        return {number: problem for number, problem in found.items() if problem is not None}

    def problem(self, tensor: torch.Tensor) -> str | None:
        """Say why a live tensor of a kind that takes values cannot be written to, or return None where it can."""
        if tensor.is_meta:
            return "on the meta device, so it has no memory; give it some (to_empty(device=...) for a module)"
        if not tensor.numel():
            return None
        begin = tensor.data_ptr()
        end = begin + span_bytes(tensor)
        storage = tensor.untyped_storage()
        if not begin or end > storage.data_ptr() + storage.nbytes():
            return (
                f"its memory has {storage.nbytes()} bytes, too few for its shape {list(tensor.shape)}: whoever resized "
                f"it (sharding does, between two uses) has to give it back first"
            )
        if tensor.device.type == "cpu" and self._is_read_only(begin, end):
            return "its memory is read-only (a file that was mapped for reading, say): clone() it first"
        return None

    def _unwritable(self) -> list[tuple[int, int]]:
        if self._read_only is None:
            self._read_only = _read_only_ranges()
        return self._read_only

    def _is_read_only(self, begin: int, end: int) -> bool:
        unwritable = self._unwritable()
        at = bisect.bisect_right(unwritable, (begin, end))
        beside = unwritable[max(0, at - 1) : at + 1]
        return any(first < end and begin < last for first, last in beside)


def span_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes lie between a tensor's first element and the end of its last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _read_only_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that must not be written to, in their order; none where the system does
    not say."""
    found: list[tuple[int, int]] = []
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            addresses, access = line.split(maxsplit=2)[:2]
            if "w" not in access:
                first, _, last = addresses.partition("-")
                found.append((int(first, 16), int(last, 16)))
    return found
