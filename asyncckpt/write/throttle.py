"""The codec ``auto`` encodes only while that is no slower than the disk; this measures and decides."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: The disk's rate is measured anew after this many bytes.
_WINDOW_BYTES = 32 << 20
#: So many writes at one time, on average, show what the disk can do; fewer only show what was asked of it.
_BUSY_WRITES = 1.5
#: While chunks are stored as they are, one in so many is encoded, to measure the codec.
_PROBE_EVERY = 64
#: The codec has to be this much faster than the disk: near balance it only warms the processor.
_MARGIN = 1.1


class AutoCompression:
    """Compares the speeds of disk and codec in one run. Thread-safe; never blocks.

    Saving raw takes ``1 / disk`` seconds a byte, saving encoded ``max(1 / (threads x codec), 1 / (ratio x disk))``: so
    encoding pays where all encoding threads together are faster than the disk.
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

    def should_encode(self) -> bool:
        """Whether the next chunk should be encoded. Call it once a chunk."""
        with self._lock:
            self._count += 1
            if not self._codec_rate:  # the very first: to know the codec
                return self._count == 1
            if not self._disk_rate:
                return False
            gains = self._ratio > 1.01 and self._threads * self._codec_rate > _MARGIN * self._disk_rate
            return gains or self._count % _PROBE_EVERY == 0

    def record_encode(self, nbytes: int, stored: int, seconds: float) -> None:
        """Record that one thread encoded ``nbytes`` into ``stored`` bytes in so many seconds."""
        with self._lock:
            rate = nbytes / max(seconds, 1e-9)
            first = not self._codec_rate
            self._codec_rate = rate if first else 0.9 * self._codec_rate + 0.1 * rate
            self._ratio = nbytes / stored if first else 0.9 * self._ratio + 0.1 * nbytes / stored

    @contextmanager
    def timing_write(self, nbytes: int) -> Iterator[None]:
        """Measure the write of ``nbytes`` in the body. Wrap every write in it."""
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
