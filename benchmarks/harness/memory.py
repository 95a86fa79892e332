"""The resident memory of this process is measured here, shared memory included."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_SAMPLE_SECONDS = 0.005


def resident_bytes() -> int:
    """Return ``VmRSS``: anonymous, file-backed and shared pages (``RssAnon + RssFile + RssShmem``)."""
    return _status()["VmRSS"]


def shared_bytes() -> int:
    """Return ``RssShmem``, the shared-memory part of ``resident_bytes``."""
    return _status()["RssShmem"]


def settle() -> None:
    """Give freed memory back to the kernel, so that a baseline does not hide later growth."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@dataclass(slots=True)
class Peak:
    """Holds the highest ``rss_bytes`` and ``shmem_bytes`` seen inside ``watch_peak``."""

    rss_bytes: int = 0
    shmem_bytes: int = 0
    samples: int = field(default=0)


@contextmanager
def watch_peak() -> Iterator[Peak]:
    """Find the peak while the block runs, from the kernel's own high-water mark, and from samples of the shared
    part."""
    peak = Peak()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # this resets VmHWM, proc(5)
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            status = _status()
            peak.rss_bytes = max(peak.rss_bytes, status["VmRSS"])
            peak.shmem_bytes = max(peak.shmem_bytes, status["RssShmem"])
            peak.samples += 1

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.rss_bytes = max(peak.rss_bytes, _status()["VmHWM"])


def _status() -> dict[str, int]:
    found: dict[str, int] = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM", "RssShmem"):
                found[name] = int(value.split()[0]) << 10  # the kernel's "kB" are KiB
    return found
