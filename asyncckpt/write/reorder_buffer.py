"""The reorder buffer: encoded frames wait in it for their turn in a file."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from asyncckpt.memory.arena import Arena
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.stage.image import Frame
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.progress import EncodedChunk, ShardProgress

#: The most bytes of frames that wait for their turn outside the arena.
_MAX_COPIED_BYTES = 256 << 20


class ReorderBuffer:
    """Gives frames their places in the layout's order, so that equal states give equal files, whichever thread is
    first. A frame whose turn has not come is held in its slot.

    Held slots must never keep other extents from being staged. So once they hold a quarter of the arena, frames are
    held in memory of their own, and once that is full too, frames are placed out of order: the manifest says where
    everything is. ``lock`` guards the progress of the shards. Thread-safe, except that an item is released once.
    """

    def __init__(self, lock: threading.Lock, encoder: Encoder, arena: Arena) -> None:
        self._lock = lock
        self._encoder = encoder
        self._arena = arena
        self._held_bytes = self._copied_bytes = 0
        self._abandoned = False

    def place(self, progress: ShardProgress, item: EncodedChunk) -> list[tuple[EncodedChunk, int]]:
        """Hold the frame, or return the frames that can be written now, each with its offset in the file."""
        with self._lock:
            slot = item.slot
            if self._abandoned:
                self.release(item)
                return []
            room = slot is not None and self._held_bytes + slot.nbytes <= self._arena.budget_bytes // 4
            if slot is not None and item.number != progress.next_in_order:
                if room:
                    self._encoder.move_to_slot(item.frame, slot)
                    progress.held[item.number] = item
                    self._held_bytes += slot.nbytes
                    return []
                if self._copied_bytes + padded(item.frame.payload_bytes) <= _MAX_COPIED_BYTES:
                    progress.held[item.number] = self._copy_out(item)
                    return []
            placed = [(item, progress.place(item))]
            while (after := progress.held.pop(progress.next_in_order, None)) is not None:
                if after.slot is not None:
                    self._held_bytes -= after.slot.nbytes
                else:
                    self._copied_bytes -= padded(after.frame.payload_bytes)
                placed.append((after, progress.place(after)))
        if item.frame.buffer is not None and slot is not None:  # what was staged is in the buffer now
            item.slot = None
            self._arena.release(slot)
        return placed

    def _copy_out(self, item: EncodedChunk) -> EncodedChunk:
        """Copy the frame into memory of its own, and release its slot."""
        frame = item.frame
        nbytes = padded(frame.payload_bytes)
        buffer = memoryview(aligned_buffer(nbytes))
        buffer[:nbytes] = frame.view[:nbytes]
        self.release(item)
        self._copied_bytes += nbytes
        return EncodedChunk(item.number, None, Frame(buffer, frame.payload_bytes, None, frame.unchanged), item.content)

    def release(self, item: EncodedChunk) -> None:
        """Give back the memory that a frame lies in. Call it once an item."""
        self._encoder.release(item.frame.buffer)
        if item.slot is not None:
            self._arena.release(item.slot)

    def abandon(self, shards: Sequence[ShardProgress]) -> None:
        """Give back the memory of all frames that wait for these shards, and of every frame placed later.
        Idempotent."""
        with self._lock:
            self._abandoned = True
            waiting = [item for progress in shards for item in progress.held.values()]
            for progress in shards:
                progress.held.clear()
            self._held_bytes = self._copied_bytes = 0
        for item in waiting:
            self.release(item)
