"""Writes a checkpoint whose bytes are made while it is written, a window of a file at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from asyncckpt.manifest.records import FileRecord
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.protocols import Digest, PendingDirectory
from asyncckpt.stage.copy import _without_threads
from asyncckpt.types import Extent, ShardFile
from asyncckpt.write.made_shards import write_made_shards

#: Extents of a file are made and written together, up to this many bytes: each source is read once for all of them.
WINDOW_BYTES = 8 << 20
#: So many windows are worked on at a time: while one waits for the disk, others compute.
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Stretch:
    """``Stretch`` is a contiguous part of a piece that a window wants: its bytes ``[begin, begin + nbytes)``. ``out``
    is where they go, as uint8, and ``offset`` where that begins in the window."""

    piece: int
    begin: int
    nbytes: int
    offset: int
    out: torch.Tensor


class Scratch:
    """Lends memory to what works on one window, and keeps it for the next one: fresh memory takes as long to get as it
    does to be read from a fast disk. For one thread."""

    def __init__(self) -> None:
        self._slabs: list[memoryview] = []
        self._slab = self._used = 0
        self._reading = memoryview(b"")

    def take(self, nbytes: int) -> memoryview:
        """Return aligned memory of ``nbytes``, and of what is missing to a whole block, that is the caller's until
        ``clear``, with anything in it."""
        room = padded(nbytes)
        while self._slab < len(self._slabs) and self._used + room > len(self._slabs[self._slab]):
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self._slabs):
            self._slabs.append(memoryview(aligned_buffer(max(room, WINDOW_BYTES))))
        found = self._slabs[self._slab][self._used : self._used + room]
        self._used += room
        return found

    def tensor(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return ``count`` values of such memory."""
        memory = self.take(max(1, count * dtype.itemsize))
        return torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)

    def reading(self, nbytes: int) -> memoryview:
        """Return aligned memory of ``nbytes`` and whole blocks to read into, which is the caller's until the next such
        call."""
        if len(self._reading) < padded(nbytes):
            self._reading = memoryview(aligned_buffer(nbytes))
        return self._reading

    def clear(self) -> None:
        """Take everything back."""
        self._slab = self._used = 0


#: It is called, on several threads, with what a window wants and memory to work in, and puts the bytes there.
Produce = Callable[[Sequence[Stretch], Scratch], None]


def write_shards(
    directory: PendingDirectory, shards: Sequence[ShardFile], produce: Produce, digest: Digest
) -> list[FileRecord]:
    """Write the files of plain shards, whose tensors' bytes ``produce`` makes; return their records. They are durable
    then. Blocks. Takes ``_THREADS`` windows of memory, and what ``produce`` takes."""
    local = threading.local()

    @contextlib.contextmanager
    def made(window: Sequence[Extent]) -> Iterator[memoryview]:
        scratch: Scratch = getattr(local, "scratch", None) or Scratch()
        local.scratch = scratch
        scratch.clear()
        base = window[0].offset
        buffer = scratch.take(window[-1].offset + window[-1].nbytes - base)
        with _without_threads():  # there is a window on each core already
            produce(list(_stretches(window, base, torch.frombuffer(buffer, dtype=torch.uint8))), scratch)
        for extent in window:
            at = extent.offset - base
            buffer[at : at + len(extent.header)] = extent.header
        yield buffer

    return write_made_shards(directory, shards, made, digest, threads=_THREADS, window_bytes=WINDOW_BYTES)


def _stretches(extents: Sequence[Extent], base: int, memory: torch.Tensor) -> Iterator[Stretch]:
    """Yield what a window wants of each piece, which goes on from extent to extent."""
    at: tuple[int, int, int, int] | None = None

    def stretch(piece: int, begin: int, nbytes: int, offset: int) -> Stretch:
        return Stretch(piece, begin, nbytes, offset, memory[offset : offset + nbytes])

    for extent in extents:
        for segment in extent.segments:
            offset = extent.offset - base + segment.extent_offset
            if at is not None:
                piece, begin, nbytes, where = at
                if piece == segment.piece and begin + nbytes == segment.source_offset and where + nbytes == offset:
                    at = piece, begin, nbytes + segment.nbytes, where
                    continue
                yield stretch(*at)
            at = segment.piece, segment.source_offset, segment.nbytes, offset
    if at is not None:
        yield stretch(*at)
