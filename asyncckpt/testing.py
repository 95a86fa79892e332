"""Doubles for tests of code that saves checkpoints: devices that are slow, stuck, or fail one call of your choice.

Put one into a store: ``checkpointer._store.ops = GatedOps()``, or make ``LocalStore(path, ops=…)``.
"""

from __future__ import annotations

import errno as errnos
import inspect
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncckpt.protocols import Buffer
from asyncckpt.storage.posix import PosixOps


class SlowOps(PosixOps):
    """Every write takes ``seconds`` longer: the arena stays full while training goes on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        time.sleep(self.seconds)
        return super().pwrite(fd, data, offset)


class GatedOps(PosixOps):
    """Writes wait until ``gate`` is set: a save stays in flight for as long as a test needs it."""

    def __init__(self, timeout_seconds: float = 30.0) -> None:
        self.gate = threading.Event()
        self.timeout_seconds = timeout_seconds

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self.gate.wait(self.timeout_seconds)
        return super().pwrite(fd, data, offset)


class FaultyOps(PosixOps):
    """Records every call as ``(name, subject)`` in ``log`` and fails one of them.

    ``fail = ("fsync", 2, errno.EIO)``: the second fsync from then on raises. ``seen`` counts the calls of that name.
    ``short_writes`` lets every write take at most 4096 bytes.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.fail: tuple[str, int, int] | None = None
        self.short_writes = False
        self.seen = 0

    def _call(self, name: str, subject: object) -> None:
        self.log.append((name, os.path.basename(str(subject))))
        if self.fail is not None and self.fail[0] == name:
            self.seen += 1
            if self.seen == self.fail[1]:
                raise OSError(self.fail[2], os.strerror(self.fail[2]))

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self._call("open", path)
        return super().open(path, flags, mode)

    def close(self, fd: int) -> None:
        super().close(fd)
        self._call("close", fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._call("pwrite", fd)
        return super().pwrite(fd, memoryview(data)[:4096] if self.short_writes else data, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        self._call("truncate", fd)
        super().truncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        self._call("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        super().fsync(fd)

    def fsync_directory(self, path: str) -> None:
        self._call("fsync_directory", path)
        super().fsync_directory(path)

    async def write_file(self, path: str, data: bytes) -> None:
        self._call("write_file", path)
        await super().write_file(path, data)

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path)
        super().mkdir(path)

    def link(self, source: str, target: str) -> None:
        self._call("link", target)
        super().link(source, target)

    def reflink(self, source: str, target: str) -> None:
        self._call("reflink", target)
        super().reflink(source, target)

    def rename_noreplace(self, source: str, target: str) -> None:
        self._call("rename_noreplace", target)
        super().rename_noreplace(source, target)


class ThrottledOps(PosixOps):
    """A device that takes ``bytes_per_second``, all writers together: a network file system, a cheap cloud disk."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_seconds = 0.0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        nbytes = memoryview(data).nbytes
        with self._lock:
            self._free_seconds = max(self._free_seconds, time.monotonic()) + nbytes / self.bytes_per_second
            until = self._free_seconds
        written = super().pwrite(fd, data, offset)
        time.sleep(max(0.0, until - time.monotonic()))
        return written


#: The operations of the seam, by name.
OPERATIONS: Final = tuple(name for name in vars(PosixOps) if not name.startswith("_"))


class InterceptedOps(PosixOps):
    """Calls ``before(name, args)`` and ``after(name, args)`` around every operation: override either.

    ``before`` gives the arguments to go on with (``after`` gets that very tuple), and may raise, sleep, or end the
    process.
    """

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        pass


def _intercepted(name: str) -> Callable[..., Any]:
    original = getattr(PosixOps, name)

    def call(self: InterceptedOps, *args: Any) -> Any:
        args = self.before(name, args)
        result = original(self, *args)
        self.after(name, args)
        return result

    async def call_async(self: InterceptedOps, *args: Any) -> Any:
        args = self.before(name, args)
        result = await original(self, *args)
        self.after(name, args)
        return result

    return call_async if inspect.iscoroutinefunction(original) else call


for _name in OPERATIONS:
    setattr(InterceptedOps, _name, _intercepted(_name))


class KillingOps(InterceptedOps):
    """The process kills itself at operation ``number`` (from 1), before it is done or right ``after`` it."""

    def __init__(self, number: int, *, after: bool) -> None:
        self.number = number
        self.done = after
        self.seen = 0
        self._lock = threading.Lock()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.done:
            self._count()
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if self.done:
            self._count()

    def _count(self) -> None:
        with self._lock:
            self.seen += 1
            if self.seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a save talks to the kernel: an operation, on what (without steps and uuids), which time."""

    operation: str
    subject: str
    occurrence: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at a site: an ``errno`` ``before`` or ``after`` the operation is done, or ``half`` way; a
    ``short`` write; a ``delay``. ``persistent``: at every later call of that operation too."""

    site: Site
    kind: str
    errno: int = 0
    persistent: bool = False

    def __str__(self) -> str:
        what = errnos.errorcode.get(self.errno, self.kind)
        where = f"{self.site.operation} {self.site.subject} ({self.site.occurrence})"
        return f"{what} {self.kind} {where}{', persistent' if self.persistent else ''}"


class _Late(tuple[Any, ...]):
    """Arguments of an operation that is to be done and fail then."""

    faults: Sequence[Fault] = ()


class SiteFaultOps(InterceptedOps):
    """Names the site of every operation, and lets armed faults happen at theirs. Thread-safe.

    ``sites`` are those seen since ``arm``, in order; ``hits`` the faults that have happened, in order.
    """

    def __init__(self, root: str, delay_seconds: float = 0.02) -> None:
        self.root = root
        self.delay_seconds = delay_seconds
        self.sites: list[Site] = []
        self.hits: list[Fault] = []
        self._faults: tuple[Fault, ...] = ()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def arm(self, *faults: Fault) -> None:
        """Let these happen from now on (none: no more faults), and count occurrences anew."""
        with self._lock:
            self._faults = faults
            self.sites, self.hits = [], []
            self._counts.clear()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        due = self._due(name, args)
        for fault in due:
            if fault.kind == "before":
                raise OSError(fault.errno, os.strerror(fault.errno), self.root)
            if fault.kind == "delay":
                time.sleep(self.delay_seconds)
            elif fault.kind == "short":
                fd, data, offset = args
                args = fd, memoryview(data)[: max(1, memoryview(data).nbytes // 2)], offset
            elif fault.kind == "half":
                _do_half(name, args)
                raise OSError(fault.errno, os.strerror(fault.errno), self.root)
        if any(fault.kind == "after" for fault in due):
            args = _Late(args)
            args.faults = due
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        for fault in args.faults if isinstance(args, _Late) else ():
            if fault.kind == "after":
                raise OSError(fault.errno, os.strerror(fault.errno), self.root)

    def _due(self, name: str, args: tuple[Any, ...]) -> list[Fault]:
        subject = self._subject(name, args)
        with self._lock:
            self._counts[name, subject] += 1
            site = Site(name, subject, self._counts[name, subject])
            self.sites.append(site)
            begun = {fault for fault in self.hits if fault.persistent}
            due = [
                fault
                for fault in self._faults
                if fault.site == site or (fault in begun and fault.site.operation == name)
            ]
            self.hits += [fault for fault in due if fault not in self.hits]
        return due

    def _subject(self, name: str, args: tuple[Any, ...]) -> str:
        subject = args[-1] if name in ("rename_noreplace", "exchange", "replace", "link", "reflink") else args[0]
        if isinstance(subject, int):
            try:
                subject = os.readlink(f"/proc/self/fd/{subject}").removesuffix(" (deleted)")
            except OSError:
                subject = ""
        subject = os.path.relpath(subject, self.root) if subject else ""
        subject = re.sub(r"\b[0-9a-f]{8}[0-9a-f]*\b", "*", subject)
        return re.sub(r"-\*(-\*)?", "-*", subject)


def _do_half(name: str, args: Sequence[Any]) -> None:
    """The traces of an operation that failed on its way."""
    if name == "write_file":
        with open(args[0], "xb") as file:
            file.write(args[1][: len(args[1]) // 2])
    elif name == "pwrite":
        fd, data, offset = args
        view = memoryview(data)
        PosixOps().pwrite(fd, view[: view.nbytes // 2 // 4096 * 4096 or view.nbytes], offset)
    elif name == "open":
        os.close(os.open(*args))
    elif name == "reflink":
        os.close(os.open(args[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
