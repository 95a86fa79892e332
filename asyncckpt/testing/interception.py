"""These doubles come between a store and the system: calls are counted, fail at a chosen site, or end the process."""

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

from asyncckpt.storage.posix import PosixOps

#: These are the operations of the seam, by name.
OPERATIONS: Final = tuple(name for name in vars(PosixOps) if not name.startswith("_"))

#: These only look.
READING: Final = frozenset(
    {"open_to_read", "close_read", "pread", "preadv", "stat", "lstat", "names", "scan", "lock", "free_bytes"}
)

#: The last argument of these is the path that they make.
_TWO_PATHS: Final = frozenset({"rename_noreplace", "try_rename_noreplace", "exchange", "replace", "link", "reflink"})


class InterceptedOps(PosixOps):
    """Calls ``before(name, args)`` and ``after(name, args)`` around every operation; a subclass overrides either.

    ``before`` returns the arguments to go on with (``after`` gets that very tuple), and may raise, sleep, or end the
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
    """Kills its process at operation ``number`` (from 1) of those that change something, before it is done or right
    ``after`` it. A kill could interrupt nothing in between."""

    def __init__(self, number: int, *, after: bool) -> None:
        self.number = number
        self.done = after
        self.seen = 0
        self._lock = threading.Lock()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.done and name not in READING:
            self._count()
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if self.done and name not in READING:
            self._count()

    def _count(self) -> None:
        with self._lock:
            self.seen += 1
            if self.seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Site:
    """Names one place where a save talks to the kernel: an operation, its subject (without steps and uuids), and which
    time of it, from 1."""

    operation: str
    subject: str
    occurrence: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Says what goes wrong at a site: an ``errno`` ``before`` or ``after`` the operation is done, or ``half`` way; a
    ``short`` write; a ``delay``. ``persistent`` makes it go wrong at every later call of that operation too."""

    site: Site
    kind: str
    errno: int = 0
    persistent: bool = False

    def __str__(self) -> str:
        what = errnos.errorcode.get(self.errno, self.kind)
        where = f"{self.site.operation} {self.site.subject} ({self.site.occurrence})"
        return f"{what} {self.kind} {where}{', persistent' if self.persistent else ''}"


class _Late(tuple[Any, ...]):
    """Carries the arguments of an operation that is to be done and to fail afterwards."""

    faults: Sequence[Fault] = ()


class SiteFaultOps(InterceptedOps):
    """Names the site of every operation, and lets armed faults happen at theirs. Thread-safe.

    ``sites`` lists those seen since ``arm``, ``hits`` the faults that have happened, both in order.
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
        """Let these faults happen from now on (none means no more faults), and count occurrences anew."""
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
        subject = args[-1] if name in _TWO_PATHS else args[0]
        if isinstance(subject, int):
            subject = _path_of(subject)
        elif name in ("open_to_read", "lstat") and isinstance(args[-1], int):
            subject = os.path.join(_path_of(args[-1]), subject)
        subject = os.path.relpath(subject, self.root) if subject else ""
        subject = re.sub(r"\b[0-9a-f]{8}[0-9a-f]*\b", "*", subject)
        return re.sub(r"-\*(-\*)?", "-*", subject)


def _path_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    except OSError:
        return ""


def _do_half(name: str, args: Sequence[Any]) -> None:
    """Leave the traces of an operation that failed on its way."""
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
