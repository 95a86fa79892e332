"""``examine``, which the command and programs call, runs the checks in their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from asyncckpt.catalog.misplaced import refuse_checkpoint
from asyncckpt.doctor import mounts, semantics, speed
from asyncckpt.doctor.advice import Seen, rate, recommend
from asyncckpt.doctor.durability import Probe
from asyncckpt.doctor.findings import Finding, Report, Speeds, Status
from asyncckpt.doctor.ops import DoctorOps
from asyncckpt.doctor.scratch import Scratch
from asyncckpt.doctor.system import System
from asyncckpt.errors import AsyncCkptError, InvalidOption, RunLocked, RunPathError
from asyncckpt.memory.available import available_memory_bytes
from asyncckpt.run import Run
from asyncckpt.storage import local_path, open_store
from asyncckpt.storage.lease import read_holder

#: This fraction of the free space is used at most: a doctor must not be what fills a disk.
_SHARE_OF_FREE = 20
_MIN_BYTES = 1 << 20
_BULK_BYTES = 16 << 20
_PASSES = 8
_LITTLE_BYTES = 1 << 30
_NO_BYTES = 64 << 20
_FEW_INODES = 1000


def examine(
    path: str | os.PathLike[str],
    *,
    seconds: float = 8.0,
    max_bytes: int = 256 << 20,
    on_finding: Callable[[Finding], object] | None = None,
    ops: DoctorOps | None = None,
    system: System | None = None,
) -> Report:
    """Examine the directory that a run is to be saved in; report what is wrong and what to set.

    ``path`` may hold a run, even a live one: nothing but a directory of the doctor's own (``.tmp-doctor-…``) is written
    there, and it is deleted again, whatever happens. Where ``path`` does not exist yet, the nearest directory above it
    is examined. ``seconds`` is about how long the speed tests take (0 leaves them out). At most ``max_bytes`` are on
    the disk at one time, and never more than a twentieth of what is free. ``on_finding`` is called with each finding as
    it comes, on the calling thread.

    Blocks on the device, for ``seconds`` and a few more; on a file system that hangs it hangs. Raises ``InvalidOption``
    for ``seconds`` outside 0 to 3600 and for an address of a bucket, ``RunPathError`` where ``path`` is a file or a
    checkpoint, and ``RunLocked`` where a run that
    begins meanwhile clears the doctor's files; everything else that goes wrong is a finding.
    """
    if not 0 <= seconds <= 3600:
        raise InvalidOption(f"seconds must be from 0 to 3600, not {seconds!r}")
    if max_bytes < _MIN_BYTES:
        raise InvalidOption(f"max_bytes must be at least {_MIN_BYTES}, not {max_bytes!r}")
    asked = local_path(path)
    refuse_checkpoint(open_store(asked))
    examined = _nearest(asked)
    if not os.path.isdir(examined):
        raise RunPathError(f"{examined} is no directory; a run needs a directory. Choose another path")
    examination = _Examination(examined, seconds, max_bytes, on_finding, ops or DoctorOps(), system or System())
    examination.run(asked)
    return examination.report(asked)


class _Examination:
    def __init__(
        self,
        path: str,
        seconds: float,
        max_bytes: int,
        on_finding: Callable[[Finding], object] | None,
        ops: DoctorOps,
        system: System,
    ) -> None:
        self._path = path
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._on_finding = on_finding
        self._ops = ops
        self._system = system
        self._mount = system.mount(path)
        self._findings: list[Finding] = []
        self._speeds = Speeds()
        self._largest = 0
        self._writable = False

    def run(self, asked: str) -> None:
        self._add(self._place(asked), *mounts.checks(self._mount, self._system))
        room = self._space()
        scratch = Scratch(self._path, self._ops)
        try:
            with scratch:
                self._writable = True
                self._inside(scratch, room)
        except RunLocked:
            raise
        except OSError as error:
            self._add(semantics.failed("writing", error))
        if scratch.left_behind:
            advice = "delete it, or let the next run here do so"
            self._add(Finding("clean-up", "warning", f"could not delete {scratch.path}", advice))

    def report(self, asked: str) -> Report:
        seen = Seen(
            self._findings,
            self._speeds,
            remote=self._remote,
            direct=self._status_of("O_DIRECT") == "good",
            largest_file_bytes=self._largest,
            cores=len(os.sched_getaffinity(0)),
            missing_parents=not os.path.isdir(os.path.dirname(asked)),
        )
        settings = recommend(seen) if self._writable else ()
        return Report(asked, self._path, tuple(self._findings), self._speeds, settings)

    @property
    def _remote(self) -> bool:
        return self._mount is not None and self._mount.remote

    def _inside(self, scratch: Scratch, room: int) -> None:
        self._add_each(semantics.checks(scratch, remote=self._remote))

        def size() -> Finding:
            self._largest = semantics.largest_file(scratch)
            return semantics.size_finding(self._largest)

        self._add(semantics.guarded(scratch, "largest file", size))
        nbytes = min(self._max_bytes, room)
        if nbytes < _MIN_BYTES:
            self._add(Finding("fsync", "note", "not tried: too little space"))
            return
        probe = Probe(scratch, self._system, self._mount, min(nbytes, _BULK_BYTES))
        probe.run()
        if probe.error is None and self._seconds:
            self._measure(scratch, nbytes, probe)
        self._add_each(probe.checks(max(self._speeds.direct.values(), default=0.0)))

    def _measure(self, scratch: Scratch, nbytes: int, probe: Probe) -> None:
        # dirty pages are memory that the machine may need
        nbytes = min(nbytes, max(_MIN_BYTES, available_memory_bytes() // 8))
        direct = self._status_of("O_DIRECT") == "good"
        test = speed.Speed(scratch, direct=direct, seconds=self._seconds / _PASSES, max_bytes=nbytes)

        def measured() -> Finding:
            written = test.direct()
            buffered = test.buffered(max(written.values(), default=0.0))
            read, same = test.read()
            self._speeds = Speeds(
                written, buffered, read, speed.encoding_rate(), probe.fsync_seconds, probe.publish_seconds
            )
            if not same:
                return Finding("read back", "unsafe", "what was read is not what was written", "use another path")
            direct_text = f"{rate(max(written.values()))} with O_DIRECT, " if written else ""
            seen = f"write {direct_text}{rate(max(buffered.values()))} buffered, fsync counted in; read {rate(read)}"
            return Finding("speed", "good", seen)

        self._add(semantics.guarded(scratch, "speed", measured))

    def _place(self, asked: str) -> Finding:
        """Look at what is there already. This reads manifests at most."""
        if asked != self._path:
            seen = f"{asked} does not exist yet: {self._path} was examined"
            return Finding("run", "note", seen, "mind spelling and mounts")
        holder = read_holder(self._path)
        if holder is not None and not holder.released:
            advice = "its saves and these measurements slow each other down"
            return Finding("run", "note", f"in use by {holder}, unless that was killed", advice)
        return Finding("run", "good", "no live run")

    def _space(self) -> int:
        """Return how many bytes may be used here, and add the findings about space."""
        try:
            found = self._ops.statvfs(self._path)
        except OSError as error:
            self._add(Finding("free space", "warning", f"unknown ({error.strerror})"))
            return self._max_bytes
        if not found.f_blocks:
            self._add(Finding("free space", "note", "the file system does not say"))
            return _BULK_BYTES
        free = found.f_bavail * found.f_frsize
        self._add(self._free(free))
        if found.f_files:
            few = found.f_favail < _FEW_INODES
            advice = "a save makes a few files, a zarr save a few an array: free some" if few else ""
            self._add(Finding("free inodes", "warning" if few else "good", str(found.f_favail), advice))
        return free // _SHARE_OF_FREE

    def _free(self, free: int) -> Finding:
        seen = f"{free / 1e9:.2f} GB"
        try:
            sizes = [entry.nbytes for entry in Run(self._path).ls() if entry.damage is None]
        except (AsyncCkptError, OSError):
            sizes = []
        if free < _NO_BYTES:
            return Finding("free space", "unsafe", seen, "saves will fail: free some")
        if not sizes or not sizes[-1]:
            if free < _LITTLE_BYTES:
                return Finding("free space", "warning", seen, "little for checkpoints: free some")
            return Finding("free space", "good", seen)
        count = free // sizes[-1]
        seen += f", {count} more checkpoints like the newest ({sizes[-1] / 1e9:.2f} GB)"
        if count < 2:
            advice = "a save is written before an older checkpoint is deleted: keep fewer, or free some"
            return Finding("free space", "warning", seen, advice)
        return Finding("free space", "good", seen)

    def _status_of(self, check: str) -> Status | None:
        return next((one.status for one in self._findings if one.check == check), None)

    def _add(self, *findings: Finding) -> None:
        self._add_each(findings)

    def _add_each(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._findings.append(finding)
            if self._on_finding is not None:
                self._on_finding(finding)


def _nearest(path: str) -> str:
    """Return the path, or the nearest directory above it that exists."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
