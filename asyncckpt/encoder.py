"""Encoding staged chunks, and ``auto``'s decision: compress only while that is no slower than the disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from asyncckpt.codecs.blosc import Array, split_places
from asyncckpt.codecs.codecs import MIN_PLANES_CHUNK_BYTES, Auto, Planes
from asyncckpt.memory.arena import Slot
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.protocols import Codec
from asyncckpt.stage.image import Frame, as_it_is, slot_bytes
from asyncckpt.types import LEAD_BYTES, Extent

#: The rate of the disk is taken anew after this many bytes.
_WINDOW_BYTES = 32 << 20
#: Writes that overlap at least this much on average show what the disk can do; fewer show what it was asked for.
_BUSY_WRITES = 1.5
#: While chunks are stored as they are, one in so many is encoded, to know what the codec would do now.
_PROBE_EVERY = 64
#: The codec has to be this much faster than the disk: near balance it only warms the processor.
_MARGIN = 1.1


class Balance:
    """The live ratio of disk to codec speed in one run. Thread-safe; measures, never blocks.

    Saving raw takes ``1 / disk`` seconds a byte, saving encoded ``max(1 / (threads x codec), 1 / (ratio x disk))``: so
    encoding is worth while where all encoding threads together are faster than the disk.
    """

    def __init__(self, threads: int) -> None:
        self._threads = min(threads, os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._disk_rate = 0.0
        self._codec_rate = 0.0
        self._ratio = 1.0
        self._in_flight = 0
        self._changed_seconds = 0.0
        self._busy_seconds = 0.0
        self._flight_seconds = 0.0
        self._bytes = 0
        self._count = 0

    def worth(self) -> bool:
        """Whether the next chunk should be encoded."""
        with self._lock:
            self._count += 1
            if not self._codec_rate:  # the very first: to know the codec
                return self._count == 1
            if not self._disk_rate:
                return False
            gains = self._ratio > 1.01 and self._threads * self._codec_rate > _MARGIN * self._disk_rate
            return gains or self._count % _PROBE_EVERY == 0

    def encoded(self, nbytes: int, stored: int, seconds: float) -> None:
        """A chunk was encoded by one thread."""
        with self._lock:
            rate = nbytes / max(seconds, 1e-9)
            first = not self._codec_rate
            self._codec_rate = rate if first else 0.9 * self._codec_rate + 0.1 * rate
            self._ratio = nbytes / stored if first else 0.9 * self._ratio + 0.1 * nbytes / stored

    @contextmanager
    def writing(self, nbytes: int) -> Iterator[None]:
        """Around every write."""
        self._move(+1)
        try:
            yield
        finally:
            self._move(-1, nbytes)

    def _move(self, change: int, nbytes: int = 0) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._in_flight:
                self._busy_seconds += now - self._changed_seconds
                self._flight_seconds += self._in_flight * (now - self._changed_seconds)
            self._changed_seconds = now
            self._in_flight += change
            self._bytes += nbytes
            if self._bytes >= _WINDOW_BYTES and self._busy_seconds:
                rate = self._bytes / self._busy_seconds
                crowded = self._flight_seconds / self._busy_seconds >= _BUSY_WRITES
                if not self._disk_rate or rate > self._disk_rate:
                    self._disk_rate = rate if not self._disk_rate else 0.5 * (self._disk_rate + rate)
                elif crowded:
                    self._disk_rate = 0.7 * self._disk_rate + 0.3 * rate
                self._bytes, self._busy_seconds, self._flight_seconds = 0, 0.0, 0.0


class Encoder:
    """Encodes chunks with one codec. Thread-safe; blocks for milliseconds, with the GIL released."""

    def __init__(self, codec: Codec, threads: int) -> None:
        self.codec = codec
        self.balance = Balance(threads)
        self._changed = threading.Condition()
        self._buffers: list[memoryview] = []
        #: Buffers there may still be: one for each thread that encodes and some more for frames that wait for the disk.
        self._left = threads + 3

    @property
    def splits(self) -> bool:
        """Whether chunks may be staged as planes."""
        return isinstance(self.codec, Auto | Planes)

    def wanted(self, extent: Extent) -> bool:
        """Whether this chunk, the next one, should be encoded at all."""
        if isinstance(self.codec, Auto | Planes) and extent.nbytes < MIN_PLANES_CHUNK_BYTES:
            return False
        return not isinstance(self.codec, Auto) or self.balance.worth()

    def encode(self, extent: Extent, slot: Slot) -> Frame:
        """The frame of a staged chunk. Give its buffer back with ``release`` once it is written."""
        image: Array = np.frombuffer(slot.view, np.uint8)
        nbytes = extent.nbytes - LEAD_BYTES
        buffer = self._acquire(padded(slot_bytes(extent)))
        out: Array = np.frombuffer(buffer, np.uint8)
        try:
            began = time.perf_counter()
            if slot.split and isinstance(self.codec, Auto | Planes):
                count = nbytes // extent.item_bytes
                places = split_places(nbytes, extent.item_bytes)
                stored = self.codec.attempt_split([image[place : place + count] for place in places], out)
            else:
                stored = self.codec.attempt(image[LEAD_BYTES : extent.nbytes], extent.item_bytes, out)
            self.balance.encoded(nbytes, stored or nbytes, time.perf_counter() - began)
        except BaseException:
            self.release(buffer)
            raise
        if not stored:
            self.release(buffer)
            return as_it_is(extent, slot)
        buffer[stored : padded(stored)] = bytes(padded(stored) - stored)
        return Frame(buffer, stored, buffer)

    def park(self, frame: Frame, slot: Slot) -> None:
        """Move a frame into the slot its data came from, so that buffers never run out however long it waits."""
        if frame.buffer is not None:
            nbytes = padded(frame.stored)
            slot.view[:nbytes] = frame.buffer[:nbytes]
            self.release(frame.buffer)
            frame.view, frame.buffer = slot.view, None

    def release(self, buffer: memoryview | None) -> None:
        """Give a frame's buffer back."""
        if buffer is not None:
            with self._changed:
                self._buffers.append(buffer)
                self._changed.notify()

    def give_up(self, count: int) -> None:
        """As many buffers may never come back: there may be as many others."""
        with self._changed:
            self._left += count
            self._changed.notify_all()

    def _acquire(self, nbytes: int) -> memoryview:
        """Blocks while the disk is behind: whoever writes never waits for whoever encodes."""
        with self._changed:
            self._changed.wait_for(lambda: self._buffers or self._left)
            for number, buffer in enumerate(self._buffers):
                if buffer.nbytes >= nbytes:
                    return self._buffers.pop(number)
            if self._buffers:
                self._buffers.pop()  # too small for this layout: a larger one takes its place
            else:
                self._left -= 1
        return memoryview(aligned_buffer(nbytes))
