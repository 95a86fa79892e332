"""A run directory has one live writer: this is how it is held, proved dead, and taken over.

The holder keeps an exclusive ``flock`` on ``.asyncckpt-lease.lock`` (released by the kernel when the process dies)
and rewrites ``.asyncckpt-lease.json`` with a rising beat. A newcomer that gets the lock on the same boot of the same
host knows that the holder is gone. On another host locks are advisory at best (NFS, Lustre), so it also watches the
beat for ``ttl_seconds`` by its own clock: neither timestamps nor pids of another machine are trusted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asyncckpt import forks
from asyncckpt.errors import LeaseLost, RunLocked, RunPathError
from asyncckpt.jsontree import loads
from asyncckpt.protocols import Hold
from asyncckpt.types import Holder, LeaseOptions

log = logging.getLogger("asyncckpt")

LOCK_FILE = ".asyncckpt-lease.lock"
LEASE_FILE = ".asyncckpt-lease.json"
_RECORD_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: The longest that giving a directory back waits for its storage.
_RELEASE_SECONDS = 10.0
#: Linux lists a process's descriptors here; elsewhere the folder is missing, and what a child has is not looked for.
_DESCRIPTORS = "/proc/self/fd"
#: Who waits for a process that finishes looks this often.
_LOOK_SECONDS = 0.02
#: A record takes a few hundred bytes.
_MAX_RECORD_BYTES = 64 << 10


def read_holder(directory: str) -> Holder | None:
    """Return the recorded holder, or None where the file is missing or cannot be read (it is a record, no lock)."""
    try:
        return _read_record(directory)
    except OSError:
        return None


def _read_record(directory: str) -> Holder | None:
    """Return the recorded holder, or None where there is no record. Raises ``OSError`` where nobody can tell what the
    file says."""
    try:
        fd = os.open(os.path.join(directory, LEASE_FILE), _RECORD_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link or a device somebody planted is no record
            return None
        raise
    try:
        # a planted FIFO or device is not read from: that could block, or never end
        data = os.read(fd, _MAX_RECORD_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
    return parse_holder(data)


def parse_holder(data: bytes) -> Holder | None:
    """Return the holder that a lease file of this content records; None for any other content."""
    try:
        body: Any = loads(data, LEASE_FILE)
        return Holder(
            str(body["owner"]),
            str(body["host"]),
            str(body["boot"]),
            int(body["pid"]),
            int(body["beat"]),
            bool(body["released"]),
            int(body.get("lock", 0)),
            bool(body.get("finishing", False)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


class _LockFile:
    """Holds the lock file open. A forked child shares the open file description and would keep the lock of a killed
    trainer alive, so the file is closed there. Raises ``OSError`` where it cannot be opened."""

    def __init__(self, path: str, fd: int = -1) -> None:
        self._path = os.path.realpath(path)
        self.fd = fd
        self._opening = True
        forks.disarm_in_child(self)  # before there is a descriptor: another thread may fork as soon as there is
        if fd < 0:  # a link somebody planted is not followed, nor is a FIFO waited for
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        self._opening = False

    def unlock(self) -> None:
        """Give the lock back, and close the file. A process that the descriptor was passed to loses the lock, too."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def disarm(self) -> None:
        if self._opening and self.fd < 0:  # the thread that opened it is not in this child, and what it got is
            for fd in os.listdir(_DESCRIPTORS):
                with contextlib.suppress(OSError):
                    if os.readlink(f"{_DESCRIPTORS}/{fd}") == self._path:
                        os.close(int(fd))
        self.close()


class Lease:
    """Holds a run directory. Thread-safe. ``acquire`` blocks for at most ``ttl_seconds``."""

    directory: str
    owner: str

    def __init__(self, directory: str, lock: _LockFile, options: LeaseOptions, adopted: Holder | None = None) -> None:
        self.directory = directory
        self.owner = adopted.owner if adopted is not None else uuid.uuid4().hex
        self.options = options
        self._finishing = adopted is not None
        self._lock_file = lock
        self._inode = os.fstat(lock.fd).st_ino
        self._pid = os.getpid()
        self._beat = adopted.beat if adopted is not None else 0
        self._given_back = False
        self._stop = threading.Event()
        self._write_lock = threading.Lock()
        self._write(released=False)
        # the thread must not keep a forgotten lease alive: it holds a weak reference, and the finalizer ends it
        self._finalizer = forks.finalize(self, _let_go, lock, self._stop)
        self._thread = threading.Thread(
            target=keep_beating,
            args=(weakref.WeakMethod(self._renew), self._stop, options.beat_seconds),
            name="asyncckpt-lease",
            daemon=True,
        )
        self._thread.start()

    @classmethod
    def acquire(cls, directory: str, *, takeover: bool = False, options: LeaseOptions | None = None) -> Lease:
        """Hold ``directory``. Raises ``RunLocked`` while another live run holds it.

        ``takeover=True`` replaces the lock file, so that a holder that cannot be reached any more is cut off: its
        next commit fails with ``LeaseLost``.
        """
        options = options or LeaseOptions()
        path = os.path.join(directory, LOCK_FILE)
        if takeover:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        try:
            lock = _LockFile(path)
        except OSError as error:
            raise RunPathError(f"{path}: cannot open the lock file ({error}); repair the path") from error
        try:
            if not stat.S_ISREG(os.fstat(lock.fd).st_mode):
                raise RunPathError(f"{path} is no regular file; remove it, or use another directory")
            if not _lock(lock.fd) and not _wait_for_the_last(directory, lock.fd, options):
                raise locked(directory, read_holder(directory))
            if os.fstat(lock.fd).st_ino != os.stat(path).st_ino:
                raise locked(directory, read_holder(directory))  # somebody took over between open and lock
            if not takeover:
                _wait_until_dead(directory, options)
            return cls(directory, lock, options)
        except (RunLocked, RunPathError):
            lock.close()
            raise
        except OSError as error:
            lock.close()
            raise RunPathError(
                f"{directory}: cannot write the lease ({error}); free space or repair the path"
            ) from error

    @classmethod
    def adopt(cls, directory: str, lock: int, owner: str, options: LeaseOptions) -> Lease:
        """Go on with the lease of a process that is gone. ``lock``: the descriptor of its lock file, which that process
        has passed on; it is this lease's from then on. Blocks on the storage. Raises as ``check`` does."""
        file = _LockFile(os.path.join(directory, LOCK_FILE), lock)
        before = _read_record(directory)
        if before is None or before.owner != owner:
            raise LeaseLost(
                f"{directory}: the run was taken over by {before or 'another run'}; nothing more is published from here"
            )
        return cls(directory, file, options, before)

    @property
    def lock(self) -> int:
        """The descriptor of the lock file: a process that it is passed to holds the lock, too."""
        return self._lock_file.fd

    def check(self) -> None:
        """Raise ``LeaseLost`` where another run has taken the directory over, and ``OSError`` where that cannot be
        told (no descriptor left, a disk that fails); ``RunPathError`` where the directory was deleted. Called right
        before a publish."""
        holder = _read_record(self.directory)
        if holder is None and not os.path.lexists(os.path.join(self.directory, LOCK_FILE)):
            raise run_is_gone(self.directory)
        try:
            same_lock = os.stat(os.path.join(self.directory, LOCK_FILE)).st_ino == self._inode
        except FileNotFoundError:
            same_lock = False
        # Who was cut off may have been about to write its beat, and the record is then its own, with the lock file it
        # had. Somebody who came by this lock file (where locks do not hold across hosts) did take the directory over.
        ours = holder is not None and (holder.owner == self.owner or holder.lock not in (0, self._inode))
        if not same_lock or not ours:
            raise LeaseLost(
                f"{self.directory}: this run was taken over by {holder or 'another run'}; nothing more is published "
                f"from here. Stop this process, or save into another directory"
            )

    def release(self) -> None:
        """Give the directory back. Idempotent. Blocks for at most ten seconds: where the storage hangs, the lock goes
        when the storage is back, or with the process."""
        if not self._finalizer.alive or os.getpid() != self._pid:
            return
        # every call to hung storage may be the last of its thread, and that must not be the one that wants to leave
        giving = threading.Thread(target=self._give_back, name="asyncckpt-lease-release", daemon=True)
        giving.start()
        giving.join(_RELEASE_SECONDS)
        if giving.is_alive():
            log.warning("%s: the storage hangs; the lease is given back when it goes on", self.directory)

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):
            self.check()
            self._write(released=True)
        self._finalizer()

    def _renew(self) -> None:
        with contextlib.suppress(OSError):
            self.check()
            self._write(released=False)

    def _write(self, *, released: bool) -> None:
        with self._write_lock:
            if self._given_back:
                return  # a beat that was on its way when the directory was given back
            self._given_back = released
            self._beat += 1
            host, boot = socket.gethostname(), boot_id()
            holder = Holder(self.owner, host, boot, self._pid, self._beat, released, self._inode, self._finishing)
            temp = os.path.join(self.directory, f".tmp-lease-{self.owner}")
            Path(temp).write_text(json.dumps(asdict(holder)))
            os.replace(temp, os.path.join(self.directory, LEASE_FILE))


class HeldLease:
    """Keeps the hold on a run, once there is one. A rank that follows another in its job never has it."""

    def __init__(self) -> None:
        self.hold: Hold | None = None

    def check(self) -> None:
        """See ``Hold.check``. Does nothing where nothing is held."""
        if self.hold is not None:
            self.hold.check()


def _wait_until_dead(directory: str, options: LeaseOptions) -> None:
    """Make sure, once this process has the lock, that a holder on another host renews the lease no more."""
    holder = read_holder(directory)
    if holder is None or holder.released or holder.boot == boot_id():
        return
    deadline = time.monotonic() + options.ttl_seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.2, options.ttl_seconds / 10))
        now = read_holder(directory)
        if now is not None and (now.owner, now.beat) != (holder.owner, holder.beat):
            if now.released:
                return
            raise locked(directory, now)


def locked(directory: str, holder: Holder | None) -> RunLocked:
    return RunLocked(
        f"{directory} is in use by another live run ({holder or 'holder unknown'}). Stop that process, or use another "
        f"directory; if it can no longer be reached, take over with Checkpointer(..., run=RunOptions(takeover=True))"
    )


def run_is_gone(directory: str) -> RunPathError:
    """Return the error for a run whose directory, or whose lease in it, somebody has deleted while it was in use."""
    gone = "is gone" if not os.path.isdir(directory) else "has lost its lease files"
    return RunPathError(
        f"{directory} {gone}: somebody deleted, moved or emptied it under this run; nobody has taken it over. What was "
        f"in flight is not saved. Put it back, or make a new Checkpointer, which begins again with an empty directory"
    )


def keep_beating(renew: weakref.WeakMethod[Callable[[], None]], stop: threading.Event, beat_seconds: float) -> None:
    while not stop.wait(beat_seconds):
        method = renew()
        if method is None:
            return
        method()
        del method


def _let_go(lock: _LockFile, stop: threading.Event) -> None:
    stop.set()
    lock.unlock()


def _lock(fd: int) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_the_last(directory: str, fd: int, options: LeaseOptions) -> bool:
    """Wait for the lock of a run whose process is gone, while the background process of that one publishes what it has
    staged. Returns whether this process has the lock; False at once where the run is in use."""
    deadline = time.monotonic() + options.finish_seconds
    told = False
    while not _lock(fd):
        holder = read_holder(directory)
        ends = holder is not None and (holder.released or holder.finishing or not _lives(holder.pid))
        if not ends or holder is None or holder.boot != boot_id() or time.monotonic() > deadline:
            return False
        if not told:
            told = True
            log.info("%s: waiting until the last run (%s) has published what it had staged", directory, holder)
        time.sleep(_LOOK_SECONDS)
    return True


def _lives(pid: int) -> bool:
    """Whether a process of this machine does anything any more: one that is dead and that its parent has not asked
    after yet does nothing."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True


def boot_id() -> str:
    """Return the name of this boot of this machine: a pid or a lock means something only within one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}:{boot}"
