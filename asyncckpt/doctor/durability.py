"""``Probe`` checks whether fsync does what it says, as far as the page cache, the disk's own counters and the clock
show it. A device that lies about its cache cannot be caught without cutting its power."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator

from asyncckpt.doctor.findings import Finding
from asyncckpt.doctor.scratch import Scratch
from asyncckpt.doctor.semantics import failed
from asyncckpt.doctor.system import Mount, System, Traffic

_SMALL_BYTES = 4096
_SMALL_ROUNDS = 24
_SMALL_SECONDS = 1.0
_PUBLISHES = 5
#: No device answers sooner: a quicker call did not leave the kernel.
_NO_DEVICE_SECONDS = 15e-6
#: A platter turns once in 4 ms at 15,000 revolutions a minute.
_NO_PLATTER_SECONDS = 2e-3
#: A write at this many times the rate of O_DIRECT did not reach the device.
_TOO_FAST = 6.0
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL


class Probe:
    """Holds what was measured: ``run`` fills it, ``checks`` judges it."""

    def __init__(self, scratch: Scratch, system: System, mount: Mount | None, nbytes: int) -> None:
        self._scratch = scratch
        self._system = system
        self._mount = mount
        self.nbytes = nbytes
        self.unwritten: int | None = None
        self.before: Traffic | None = None
        self.after: Traffic | None = None
        self.fsyncs = 0
        self.fsync_seconds = 0.0
        self.bulk_rate = 0.0
        self.publish_seconds = 0.0
        self.error: OSError | None = None

    def run(self) -> None:
        """Write, fsync and publish a little. Blocks on the device; at most ``nbytes`` are written at one time."""
        try:
            self.before = self._traffic()
            self._bulk()
            self._small()
            self._publish()
            self.after = self._traffic()
        except OSError as error:
            self._scratch.check_kept()
            self.error = error

    def checks(self, direct_rate: float) -> Iterator[Finding]:
        """Judge what was measured. ``direct_rate`` is what O_DIRECT reached on this device, or 0."""
        if self.error is not None:
            yield failed("fsync", self.error)
            return
        if self._system.fsync_is_off():
            yield Finding("fsync", "unsafe", "libeatmydata is loaded", "fsync does nothing: start without it")
            return
        yield self._time(direct_rate)
        if self.unwritten is not None and not self._in_memory():
            yield self._pages()
        device = self._device()
        if device is not None:
            yield device
        seen = f"{self.publish_seconds * 1e3:.1f} ms for a directory, a file, two fsyncs and a rename"
        yield Finding("publishing", "good", seen)

    def _time(self, direct_rate: float) -> Finding:
        seconds, mount = self.fsync_seconds, self._mount
        seen = f"{seconds * 1e3:.3g} ms (median of {self.fsyncs})"
        if self._in_memory():
            return Finding("fsync time", "note", seen, "memory: there is nothing to sync to")
        if seconds < _NO_DEVICE_SECONDS:
            advice = "no device answers that soon: something on the way answers for it (a fuse program, a virtual disk)"
            return Finding("fsync time", "warning", f"suspiciously fast: {seen}", advice)
        if direct_rate and self.bulk_rate > _TOO_FAST * direct_rate:
            seen = f"{self.nbytes >> 20} MiB at {self.bulk_rate / direct_rate:.0f} times the disk's rate"
            return Finding(
                "fsync time", "warning", f"suspiciously fast: {seen}", "the bytes wait somewhere: find out where"
            )
        if mount is not None and self._system.rotating(mount) and seconds < _NO_PLATTER_SECONDS:
            advice = "a controller or a host holds the bytes: ask who runs it whether they survive a power cut"
            return Finding(
                "fsync time", "note", f"{seen}: sooner than a rotating disk can, which it says it is", advice
            )
        return Finding("fsync time", "good", seen)

    def _pages(self) -> Finding:
        if self.unwritten:
            advice = "fsync returns before the bytes leave memory: acknowledged saves can be lost; use another path"
            return Finding("fsync: page cache", "unsafe", f"{self.unwritten} pages still dirty after fsync", advice)
        return Finding("fsync: page cache", "good", "no dirty page is left after it")

    def _device(self) -> Finding | None:
        """Judge by the disk's own counters. Other programs only add to them, so what is missing never arrived."""
        if self.before is None or self.after is None or self._mount is None:
            return None
        check = "fsync: device"
        flushes = self.after.flushes - self.before.flushes
        written = self.after.written_bytes - self.before.written_bytes
        # on other file systems compression, or a device that cannot be seen, may take a share
        if self._mount.file_system in ("ext2", "ext3", "ext4", "xfs") and written < self.nbytes:
            seen = f"of {self.nbytes} bytes that were fsynced the disk has seen {written}"
            return Finding(check, "unsafe", seen, "acknowledged saves can be lost: use another path")
        if self._system.write_cache(self._mount) != "write back":
            return Finding(check, "good", f"{written >> 20} MiB reached the disk, which needs no flush")
        if not flushes:
            seen = f"{self.fsyncs} fsyncs sent no flush to a disk with a volatile cache"
            return Finding(check, "unsafe", seen, "a power cut loses acknowledged saves: turn barriers on")
        return Finding(check, "good", f"{written >> 20} MiB and {flushes} cache flushes reached the disk")

    def _in_memory(self) -> bool:
        return self._mount is not None and self._mount.in_memory

    def _traffic(self) -> Traffic | None:
        return self._system.traffic(self._mount) if self._mount is not None else None

    def _bulk(self) -> None:
        ops, path = self._scratch.ops, self._scratch.file("bulk")
        data = memoryview(os.urandom(min(self.nbytes, 4 << 20)))
        fd = ops.open(path, _CREATE)
        try:
            began, done = time.perf_counter(), 0
            while done < self.nbytes:
                done += ops.pwrite(fd, data[: self.nbytes - done], done)
            ops.fsync(fd)
            self.bulk_rate = done / (time.perf_counter() - began)
            self.unwritten = ops.unwritten_pages(fd)
        finally:
            ops.close(fd)
            ops.unlink(path)

    def _small(self) -> None:
        """Time fsyncs of rewritten blocks: they are allocated, so only the device takes time, not metadata."""
        ops, path = self._scratch.ops, self._scratch.file("small")
        fd = ops.open(path, _CREATE)
        try:
            ops.pwrite(fd, bytes(_SMALL_BYTES), 0)
            ops.fsync(fd)
            times: list[float] = []
            until = time.perf_counter() + _SMALL_SECONDS
            while len(times) < _SMALL_ROUNDS and (not times or time.perf_counter() < until):
                ops.pwrite(fd, os.urandom(_SMALL_BYTES), 0)
                began = time.perf_counter()
                ops.fsync(fd)
                times.append(time.perf_counter() - began)
            self.fsyncs, self.fsync_seconds = len(times), statistics.median(times)
        finally:
            ops.close(fd)

    def _publish(self) -> None:
        """Time what the end of every save costs, however small the save."""
        ops = self._scratch.ops
        times: list[float] = []
        until = time.perf_counter() + _SMALL_SECONDS
        while len(times) < _PUBLISHES and (not times or time.perf_counter() < until):
            temp, name = (self._scratch.file(f"publish-{part}-{len(times)}") for part in ("a", "b"))
            began = time.perf_counter()
            ops.mkdir(temp)
            fd = ops.open(os.path.join(temp, "manifest"), _CREATE)
            try:
                ops.pwrite(fd, b"{}", 0)
                ops.fsync(fd)
            finally:
                ops.close(fd)
            ops.fsync_directory(temp)
            ops.rename_noreplace(temp, name)
            ops.fsync_directory(self._scratch.path)
            times.append(time.perf_counter() - began)
        self.publish_seconds = statistics.median(times)
