"""The encoder turns staged chunks into frames; under ``auto`` it compresses only while the disk is not faster."""

from __future__ import annotations

import threading
import time

import numpy as np

from asyncckpt.codecs.blosc import Array, blosc, split_places
from asyncckpt.codecs.codecs import MIN_PLANES_CHUNK_BYTES, Auto, Blosc, Lz4, Planes
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.protocols import Codec
from asyncckpt.stage.image import Frame, as_it_is, slot_bytes
from asyncckpt.types import FRAME_HEADER_BYTES, Extent
from asyncckpt.write.throttle import AutoCompression


class Encoder:
    """Encodes chunks with one codec. Thread-safe; blocks for milliseconds, with the GIL released."""

    def __init__(self, codec: Codec, threads: int) -> None:
        self.codec = codec
        if isinstance(codec, Blosc | Lz4):
            blosc()  # imported now, not in the first save
        self.auto_compression = AutoCompression(threads)
        self._changed = threading.Condition()
        self._buffers: list[memoryview] = []
        #: How many more buffers may be made: one for each encoding thread, and some for frames that wait for the disk.
        self._left = threads + 3

    @property
    def splits(self) -> bool:
        """Whether chunks may be staged as planes."""
        return isinstance(self.codec, Auto | Planes)

    def wanted(self, extent: Extent) -> bool:
        """Whether this chunk should be encoded; ask once a chunk, as ``auto`` counts the calls."""
        if isinstance(self.codec, Auto | Planes) and extent.nbytes < MIN_PLANES_CHUNK_BYTES:
            return False
        return not isinstance(self.codec, Auto) or self.auto_compression.should_encode()

    def encode(self, extent: Extent, slot: StagingBuffer) -> Frame:
        """Encode a staged chunk and return its frame. Blocks while no buffer is free. Give the frame's buffer back with
        ``release`` once it is written."""
        image: Array = np.frombuffer(slot.view, np.uint8)
        nbytes = extent.nbytes - FRAME_HEADER_BYTES
        buffer = self._acquire(padded(slot_bytes(extent)))
        out: Array = np.frombuffer(buffer, np.uint8)
        try:
            began = time.perf_counter()
            if slot.split and isinstance(self.codec, Auto | Planes):
                count = nbytes // extent.item_bytes
                places = split_places(nbytes, extent.item_bytes)
                stored = self.codec.encode_planes_if_smaller([image[place : place + count] for place in places], out)
            else:
                stored = self.codec.encode_if_smaller(image[FRAME_HEADER_BYTES : extent.nbytes], extent.item_bytes, out)
            self.auto_compression.record_encode(nbytes, stored or nbytes, time.perf_counter() - began)
        except BaseException:
            self.release(buffer)
            raise
        if not stored:
            self.release(buffer)
            return as_it_is(extent, slot)
        buffer[stored : padded(stored)] = bytes(padded(stored) - stored)
        return Frame(buffer, stored, buffer)

    def move_to_slot(self, frame: Frame, slot: StagingBuffer) -> None:
        """Move a frame into the slot its data came from, so that buffers never run out however long it waits."""
        if frame.buffer is not None:
            nbytes = padded(frame.payload_bytes)
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
        """Allow ``count`` new buffers for those that stuck threads hold and may never give back."""
        with self._changed:
            self._left += count
            self._changed.notify_all()

    def _acquire(self, nbytes: int) -> memoryview:
        """Return a buffer of at least ``nbytes``. Blocks while the disk is behind and all are in use; a thread that
        writes never comes here, so one is given back in the end."""
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
