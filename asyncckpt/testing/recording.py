"""``RecordingOps`` records what a store asks of the file system, in the order in which it may happen.

It passes every call on to a real directory and notes those that change something, with the moment each began and ended.
``Trace`` is the outcome: events, and for each the events that always come before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import Buffer

Key = tuple[str, str, int, int]
_RANDOM = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class Event:
    """Records one call that took effect. ``kind`` is create, write, truncate, reserve, fsync, fsync_directory, mkdir,
    link, rename, exchange, unlink, rmdir, or mark (``path`` is then the label). Paths are relative to the recorder's
    root. ``handle`` names an open file for as long as the trace lasts. ``key`` is the same in another run of the
    program."""

    kind: str
    path: str
    key: Key
    begin: int
    end: int = 0
    handle: int = -1
    target: str = ""
    offset: int = 0
    data: bytes = b""
    value: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + (f" -> {self.target}" if self.target else "") + str(self.value or "")


@dataclass(slots=True)
class Trace:
    """Orders events. ``before[i]`` is a bit mask of the events that have ended whenever event ``i`` begins. Events are
    listed in an order in which they did happen."""

    events: Sequence[Event]
    before: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.before:
            self.before = [self._ended_before(event) for event in self.events]

    def _ended_before(self, event: Event) -> int:
        return sum(1 << number for number, other in enumerate(self.events) if other.end < event.begin)

    def cuts(self) -> Iterator[int]:
        """Yield every set of events that can have happened at some moment of some run, each once. With an event, a set
        holds all that come before it. In-flight calls need no case of their own: until a sync covers it, an event that
        happened may leave no trace."""
        count = len(self.events)
        stack = [(0, 0)]
        while stack:
            mask, first = stack.pop()
            yield mask
            for number in range(first, count):
                if self.before[number] & ~mask == 0:
                    stack.append((mask | 1 << number, number + 1))


class RecordingOps(PosixOps):
    """Records the calls below ``root``. Thread-safe.

    ``reflinks``: where the file system has none, a copy stands in for one. ``kill_after`` is asked about each event
    once it took effect; where it says true, the process "dies": every later call that would change something fails, and
    changes nothing. The call whose key is ``hold`` waits before it takes effect, until ``go_on`` is set.
    """

    def __init__(self, root: str, *, reflinks: bool = False) -> None:
        self.events: list[Event] = []
        self.reflinks = reflinks
        self.kill_after: Callable[[Event], bool] = lambda _event: False
        self.hold: Key | None = None
        self.held, self.go_on = threading.Event(), threading.Event()
        #: The calls with these keys began while the held call was waiting, or before it.
        self.unheld: set[Key] = set()
        self.last_activity = time.monotonic()
        self.root = os.path.abspath(root)
        self._lock, self._one_by_one = threading.Lock(), threading.Lock()
        self._clock = 0
        self._dead = False
        self._handles: dict[int, tuple[int, str]] = {}
        self._seen: dict[tuple[str, str, int], int] = {}
        self._opened = 0

    def trace(self) -> Trace:
        with self._lock:
            return Trace(sorted(self.events, key=lambda event: event.end))

    def mark(self, label: str, *value: int) -> None:
        """Note something that the program did at this moment, such as acknowledging a save."""
        with self._event("mark", label, value=value):
            pass

    def revive(self) -> None:
        """Begin the next process: calls take effect again."""
        self.kill_after, self._dead = lambda _event: False, False

    def _path(self, path: str) -> str:
        return os.path.relpath(os.path.abspath(path), self.root)

    @contextlib.contextmanager
    def _event(
        self,
        kind: str,
        path: str,
        *,
        handle: int = -1,
        target: str = "",
        offset: int = 0,
        data: bytes = b"",
        value: tuple[int, ...] = (),
    ) -> Iterator[Event]:
        stable = kind, _RANDOM.sub("*", f"{path}>{target}" if target else path), offset
        if kind == "mark":
            stable = kind, f"{path}{value}", 0
        with self._lock:
            if self._dead:
                raise OSError(errno.EIO, "the process is dead")
            self._clock += 1
            self.last_activity = time.monotonic()
            nth = self._seen[stable] = self._seen.get(stable, 0) + 1
            event = Event(kind, path, (*stable, nth), self._clock, 0, handle, target, offset, data, value)
            if not self.go_on.is_set():
                self.unheld.add(event.key)
        if event.key == self.hold:
            self.held.set()
            self.go_on.wait(60)
        with self._one_by_one:  # another thread could otherwise build on this before it is noted
            yield event
            with self._lock:
                self._clock += 1
                event.end = self._clock
                self.events.append(event)
                self._dead = self._dead or self.kill_after(event)
                self.last_activity = time.monotonic()

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if not flags & os.O_CREAT:
            raise AssertionError("the store only ever opens what it creates")
        with self._event("create", self._path(path)) as event:
            # the store pads its writes as for a device; where they really go does not matter here
            fd = super().open(path, flags & ~getattr(os, "O_DIRECT", 0), mode)
            self._adopt(fd, event)
        return fd

    def _adopt(self, fd: int, event: Event) -> None:
        with self._lock:
            self._opened += 1
            event.handle = self._opened
            self._handles[fd] = event.handle, event.path

    def close(self, fd: int) -> None:
        with self._lock:
            self._handles.pop(fd, None)
        super().close(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        handle, path = self._handles[fd]
        with self._event("write", path, handle=handle, offset=offset) as event:
            written = super().pwrite(fd, data, offset)
            event.data = bytes(memoryview(data)[:written])
        return written

    def reserve(self, fd: int, nbytes: int) -> None:
        handle, path = self._handles[fd]
        with self._event("reserve", path, handle=handle, value=(nbytes,)):
            super().reserve(fd, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        handle, path = self._handles[fd]
        with self._event("truncate", path, handle=handle, value=(nbytes,)):
            super().truncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        # the device under the tests need not sync, as the model says what syncing guarantees
        handle, path = self._handles[fd]
        with self._event("fsync", path, handle=handle):
            pass

    def fsync_directory(self, path: str) -> None:
        os.lstat(path)
        if not (inside := self._path(path)).startswith(".."):
            with self._event("fsync_directory", inside):
                pass

    async def write_file(self, path: str, data: bytes) -> None:
        await asyncio.to_thread(self._write_file, path, data)

    def _write_file(self, path: str, data: bytes) -> None:
        fd = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            done = 0
            while done < len(data):
                done += self.pwrite(fd, memoryview(data)[done:], done)
            self.fsync(fd)
        finally:
            self.close(fd)

    def mkdir(self, path: str) -> None:
        with self._event("mkdir", self._path(path)):
            super().mkdir(path)

    def link(self, source: str, target: str) -> None:
        with self._event("link", self._path(source), target=self._path(target)):
            super().link(source, target)

    def reflink(self, source: str, target: str) -> None:
        if not self.reflinks:
            raise OSError(errno.EOPNOTSUPP, "no reflinks here")
        with open(source, "rb") as file:
            data = file.read()
        self._write_file(target, data)

    def rename_noreplace(self, source: str, target: str) -> None:
        with self._event("rename", self._path(source), target=self._path(target)):
            super().rename_noreplace(source, target)

    def exchange(self, first: str, second: str) -> None:
        with self._event("exchange", self._path(first), target=self._path(second)):
            super().exchange(first, second)

    def replace(self, source: str, target: str) -> None:
        with self._event("rename", self._path(source), target=self._path(target)):
            super().replace(source, target)

    def unlink(self, path: str) -> None:
        with self._event("unlink", self._path(path)):
            super().unlink(path)

    def rmdir(self, path: str) -> None:
        with self._event("rmdir", self._path(path)):
            super().rmdir(path)


def permitted(program: Callable[[RecordingOps], object], fresh: Callable[[], RecordingOps], quiet: float) -> Trace:
    """Trace ``program`` in the order that it guarantees, not the one in which a run happened to go.

    The program runs once more for every event: that call is held back until nothing else moves for ``quiet`` seconds;
    what went on without it does not have to wait for it. Blocks for a run and ``quiet``, times the number of events.
    Too short a ``quiet`` leaves out orders that are possible, and invents none.
    """
    first = fresh()
    first.go_on.set()
    program(first)
    trace = first.trace()
    before = list(trace.before)
    number_of = {event.key: number for number, event in enumerate(trace.events)}
    for number, event in enumerate(trace.events):
        unheld = _without(program, fresh(), event.key, quiet)
        for key in unheld:
            other = number_of.get(key)
            # what lies in a directory comes after it, whichever thread made it: in another run another thread may have
            if other is not None and not (event.kind == "mkdir" and _inside(trace.events[other], event.path)):
                before[other] &= ~(1 << number)
    return Trace(trace.events, before)


def _inside(event: Event, folder: str) -> bool:
    return event.path.startswith(f"{folder}/") or event.target.startswith(f"{folder}/")


def _without(program: Callable[[RecordingOps], object], ops: RecordingOps, key: Key, quiet: float) -> set[Key]:
    ops.hold = key
    runner = threading.Thread(target=program, args=(ops,), daemon=True)
    runner.start()
    while runner.is_alive() and not ops.held.wait(0.01):
        pass
    while runner.is_alive() and time.monotonic() - ops.last_activity < quiet:
        time.sleep(quiet / 10)
    unheld = set(ops.unheld) if ops.held.is_set() else set()
    ops.go_on.set()
    runner.join()
    return unheld
