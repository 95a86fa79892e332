"""Copies that must be equal on several ranks are compared at each save, by a sample of their bytes.

The sample is copied when the save is asked for, which takes a fraction of a millisecond and waits for no device; it is
digested in the background, and travels with the rank's report. All ranks sample the same bytes: those that differ are
found where the reports meet.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from asyncckpt.codecs import digests
from asyncckpt.memory.arena import QueuedCopy
from asyncckpt.memory.tensor_bytes import _copy_strided, is_plain
from asyncckpt.plan.planned import Planned, ReplicatedTensor
from asyncckpt.stage.streams import RecordedCopy
from asyncckpt.types import LocalTensor, RowOwners

#: A save samples so many tensors, spread over all of the state; the next save takes their neighbours.
MOST_TENSORS: Final = 128
#: A save's sample has at most about so many bytes; a smaller state is compared in whole.
SAMPLE_BYTES: Final = 256 << 10
#: Sampled ranges begin at multiples of this, which every item's size divides.
_GRAIN: Final = 64


@dataclass(slots=True)  # not frozen: each save makes more than a hundred on the training thread
class _Range:
    """A range of a tensor's row-major bytes that a rank samples: ``nbytes`` from ``begin`` of the whole tensor on."""

    key: str
    tensor: LocalTensor
    begin: int
    nbytes: int


class ReplicaSample:
    """Holds what one save has sampled of this rank's copies, and names it. ``digests`` may be called on another thread
    than the one that made it."""

    def __init__(self, planned: Planned, number: int, rank: int) -> None:
        self.replicated = planned.replicated
        groups = [
            _Range(f"{component.name}.{piece.spec.name}", piece, piece.begin, min(piece.spec.nbytes, _GRAIN))
            for component in planned.components
            if component.kind == "optimizer" and component.shared
            for piece in component.pieces
            if piece.spec.name.startswith("param_groups.") and piece.spec.nbytes
        ]
        self._groups = len(groups)
        self._ranges = groups + _ranges(planned.replicated, planned.pieces, number, rank)
        self._places: list[tuple[int, int]] = []
        self._copied: list[QueuedCopy] = []
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._copy()

    def digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the digests of the tensors in this rank's parameter groups, by qualified name, and of the replicated
        ones that were sampled, by their index. Blocks until the device has copied them."""
        for copied in self._copied:
            copied.wait()
        digest, view = digests.get(digests.DEFAULT), self._bytes.numpy().data
        found = [
            (one.key, digest(view[begin:end])[:16])
            for one, (begin, end) in zip(self._ranges, self._places, strict=True)
        ]
        return dict(found[: self._groups]), dict(found[self._groups :])

    def _copy(self) -> None:
        """Copy all ranges. Of tensors on a CUDA device, the copies are enqueued on its current stream, behind whatever
        changed them."""
        total = 0
        tensors = [one.tensor.tensor for one in self._ranges]
        for one in self._ranges:
            self._places.append((total, total + one.nbytes))
            total += -(-one.nbytes // _GRAIN) * _GRAIN
        on_device = any(tensor.is_cuda for tensor in tensors)
        self._bytes = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=on_device)
        address, devices, copy = self._bytes.data_ptr(), set(), ctypes.memmove
        for one, tensor, (begin, end) in zip(self._ranges, tensors, self._places, strict=True):
            source = one.begin - one.tensor.begin
            if tensor.is_cpu and is_plain(tensor):
                copy(address + begin, tensor.data_ptr() + source, one.nbytes)
                continue
            tensor = tensor.detach()
            item = tensor.element_size()
            target = self._bytes[begin:end].view(tensor.dtype)
            if is_plain(tensor):
                flat = tensor.view(-1)[source // item : (source + one.nbytes) // item]
                target.copy_(flat, non_blocking=True)
            else:
                _copy_strided(tensor, source // item, (source + one.nbytes) // item, target)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            self._copied.append(RecordedCopy(torch.cuda.current_stream(device).record_event(), device))


def _ranges(
    replicated: Sequence[ReplicatedTensor], pieces: Sequence[LocalTensor], number: int, rank: int
) -> list[_Range]:
    """Choose what save ``number`` samples on this rank. Every rank chooses the same tensors, and the same bytes of a
    part that it holds. Over the saves, all bytes have their turn."""
    stride = max(1, -(-len(replicated) // MOST_TENSORS))
    chosen = range(number % stride, len(replicated), stride)
    most = max(_GRAIN, SAMPLE_BYTES // max(1, len(chosen)) // _GRAIN * _GRAIN)
    found: list[_Range] = []
    turn = number // stride
    for index in chosen:
        one = replicated[index]
        rows = one.rows
        part = rows.part_of_rank.get(rank)
        if part is None or one.local < 0 or len(rows.holders[part]) == 1:
            continue
        begin, end = one.part_bytes(part)
        nbytes = end - begin
        if nbytes > most:
            # the last one ends where the part does
            begin, nbytes = begin + min(turn % -(-nbytes // most) * most, nbytes - most), most
        found.append(_Range(str(index), pieces[one.local], begin, nbytes))
    return found


def whole_digests(planned: Planned, rank: int) -> dict[str, str]:
    """Digest every byte of the copies that this rank holds, by name. Blocks while it reads all of them."""
    digest, found = digests.get(digests.DEFAULT), {}
    for one in planned.replicated:
        part = one.rows.part_of_rank.get(rank)
        if part is not None and one.local >= 0 and len(one.rows.holders[part]) > 1:
            begin, end = (edge - planned.pieces[one.local].begin for edge in one.part_bytes(part))
            flat = planned.pieces[one.local].tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[one.name(part)] = digest(flat[begin:end].numpy().data)
    return found


def united(replicated: Sequence[ReplicatedTensor], rank: int, sample: Mapping[str, str]) -> dict[str, str]:
    """Return one digest of all that a rank has sampled together with the same other ranks, under a name that these
    have for it, too: where it is equal on all of them, so is every digest in it. Of thousands of ranks, each with a
    sample of many tensors, nothing else has to be looked at."""
    texts: dict[tuple[RowOwners, int], list[str]] = {}
    for index, digest in sample.items():
        one = replicated[int(index)]
        part = one.rows.part_of_rank.get(rank)
        if part is not None:
            texts.setdefault((one.rows, part), []).append(f"{index}/{part}:{digest}")
    found: dict[str, str] = {}
    for (rows, part), lines in texts.items():
        holders = rows.holders[part]
        name = f"{holders[0]}-{holders[-1]}-{zlib.crc32(repr((holders, rows.bounds)).encode())}"
        found[name] = digests.get(digests.DEFAULT)("\n".join([found.get(name, ""), *lines]).encode())[:16]
    return found


def named(replicated: Sequence[ReplicatedTensor], rank: int, sample: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of a rank's sample by the names of what they were taken of."""
    found: dict[str, str] = {}
    for index, digest in sample.items():
        one = replicated[int(index)]
        part = one.rows.part_of_rank.get(rank)
        if part is not None:
            found[one.name(part)] = digest
    return found
