"""Ranks of one host hand over what they have read by letting the others map the memory that it was read into.

Nothing is sent: the memory is a nameless file, which the others open through the owner's descriptor. It lives for as
long as somebody maps it, whatever becomes of the owner.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from asyncckpt.memory.buffers import padded
from asyncckpt.ranks.passing import Ticket
from asyncckpt.ranks.reading_plan import Message


class HostMemory:
    """Holds the two buffers that this rank reads its parts into, by turns, and maps the other ranks'. ``part_bytes``:
    of each rank's largest part, by rank. Raises ``OSError`` and ``MemoryError``."""

    def __init__(self, rank: int, part_bytes: Sequence[int]) -> None:
        self._rank = rank
        self._part_bytes = part_bytes
        self._maps: dict[int, torch.Tensor] = {}
        self._fd = os.memfd_create("asyncckpt-part", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(1, 2 * part_bytes[rank]))
        self._maps[rank] = _mapped(self._fd)

    def description(self) -> dict[str, int]:
        """Return what the other ranks need to know to map this memory."""
        return {"pid": os.getpid(), "fd": self._fd, "inode": os.fstat(self._fd).st_ino}

    def map_others(self, descriptions: Sequence[Mapping[str, int]]) -> bool:
        """Map the memory of all ranks; return whether that was possible. ``descriptions``: by rank."""
        for rank, there in enumerate(descriptions):
            if rank == self._rank or not self._part_bytes[rank]:
                continue
            try:
                fd = os.open(f"/proc/{there['pid']}/fd/{there['fd']}", os.O_RDWR | os.O_CLOEXEC)
            except OSError:  # another namespace of processes, or another user
                return False
            try:
                if os.fstat(fd).st_ino != there["inode"]:
                    return False
                self._maps[rank] = _mapped(fd)
            except (OSError, ValueError):
                return False
            finally:
                os.close(fd)
        return True

    def part(self, phase: int) -> torch.Tensor:
        """Return the buffer that this rank reads its part of a phase into."""
        return self._part_of(self._rank, phase)

    def received(self, number: int, phase: Sequence[Message]) -> Iterator[tuple[Ticket, torch.Tensor]]:
        """Yield the messages of phase ``number`` that this rank receives, each with its bytes."""
        ends: dict[int, int] = {}
        for message in phase:
            begin = ends.get(message.owner, 0)
            ends[message.owner] = begin + padded(message.nbytes)
            if self._rank in message.receivers:
                host = self._part_of(message.owner, number)[begin : begin + message.nbytes]
                yield Ticket(message, host, []), host

    def end(self, ticket: Ticket, host: torch.Tensor) -> None:
        """Return at once: what was read is there for all."""

    def close(self) -> None:
        """Close this rank's descriptor; what others have mapped stays. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _part_of(self, rank: int, phase: int) -> torch.Tensor:
        nbytes = self._part_bytes[rank]
        return self._maps[rank][phase % 2 * nbytes : (phase % 2 + 1) * nbytes]


def _mapped(fd: int) -> torch.Tensor:
    memory: Any = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED)
    with contextlib.suppress(OSError):  # huge pages only make it faster
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
