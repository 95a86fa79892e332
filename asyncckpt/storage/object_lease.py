"""One live writer per run, in storage that has no locks.

Who creates the object ``.lease/<n>`` holds the run, for as long as there is none with a higher number: creating
succeeds for one caller only. The holder renews ``.lease-beat/<n>``. A newcomer takes over where the holder has given
the run back, where it was a process of this very host that is gone, or where nothing was renewed while it watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Protocol

from asyncckpt import forks
from asyncckpt.errors import LeaseLost
from asyncckpt.storage.lease import boot_id, keep_beating, locked, parse_holder
from asyncckpt.types import Holder, LeaseOptions

_LEASE = ".lease/"
_BEAT = ".lease-beat/"
_MAX_RECORD_BYTES = 64 << 10


class Records(Protocol):
    """What a lease needs of a bucket. See ``objects.Bucket``."""

    address: str

    def create(self, key: str, data: bytes) -> None: ...

    def replace(self, key: str, data: bytes) -> None: ...

    def read(self, key: str, nbytes: int, offset: int) -> bytes | memoryview: ...

    def listing(self, prefix: str) -> Mapping[str, tuple[int, int]]: ...

    def delete(self, key: str) -> None: ...


class ObjectLease:
    """A held run. Thread-safe."""

    def __init__(self, records: Records, number: int, holder: Holder, options: LeaseOptions) -> None:
        self.owner = holder.owner
        self._records = records
        self._number = number
        self._holder = holder
        self._lock = threading.Lock()
        self._stop = threading.Event()
        # the thread must not keep a forgotten lease alive
        self._finalizer = forks.finalize(self, self._stop.set)
        threading.Thread(
            target=keep_beating,
            args=(weakref.WeakMethod(self._renew), self._stop, options.beat_seconds),
            name="asyncckpt-lease",
            daemon=True,
        ).start()

    @classmethod
    def acquire(cls, records: Records, *, takeover: bool, options: LeaseOptions) -> ObjectLease:
        """Hold the run. Raises ``RunLocked`` while another live writer holds it; blocks for ``options.ttl_seconds``
        where nobody can tell whether it lives. ``takeover``: cut it off without asking."""
        last = _last(records)
        if last and not takeover:
            _wait_until_dead(records, last, options)
        holder = Holder(uuid.uuid4().hex, socket.gethostname(), boot_id(), os.getpid(), 0, False)
        try:
            records.create(f"{_LEASE}{last + 1:08d}", _packed(holder))
        except FileExistsError:
            raise locked(records.address, read_record(records)) from None
        for number in range(max(1, last - 8), last + 1):
            for folder in (_LEASE, _BEAT):
                records.delete(f"{folder}{number:08d}")
        return cls(records, last + 1, holder, options)

    def check(self) -> None:
        """Raise ``LeaseLost`` where another writer has taken the run over."""
        if _last(self._records) != self._number:
            raise LeaseLost(
                f"{self._records.address}: this run was taken over by {read_record(self._records) or 'another run'}; "
                f"nothing more is published from here. Stop this process, or save into another place"
            )

    def release(self) -> None:
        """Give the run back. Idempotent; never raises."""
        if self._finalizer.alive and os.getpid() == self._holder.pid:
            self._finalizer()
            self._renew(released=True)

    def _renew(self, *, released: bool = False) -> None:
        with contextlib.suppress(OSError, LeaseLost), self._lock:
            if self._holder.released:
                return
            self.check()
            self._holder = replace(self._holder, beat=self._holder.beat + 1, released=released)
            self._records.replace(f"{_BEAT}{self._number:08d}", _packed(self._holder))


def read_record(records: Records) -> Holder | None:
    """Return what is recorded of the run's writer, or None where nothing can be read."""
    number = _last(records)
    for folder in (_BEAT, _LEASE):
        with contextlib.suppress(FileNotFoundError):
            return parse_holder(bytes(records.read(f"{folder}{number:08d}", _MAX_RECORD_BYTES, 0)))
    return None


def _last(records: Records) -> int:
    numbers = (key.removeprefix(_LEASE) for key in records.listing(_LEASE))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _packed(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _wait_until_dead(records: Records, last: int, options: LeaseOptions) -> None:
    holder = read_record(records)
    deadline = time.monotonic() + options.ttl_seconds
    while holder is not None and not holder.released and not _is_gone(holder):
        if time.monotonic() >= deadline:
            return
        time.sleep(min(0.2, options.ttl_seconds / 10))
        now = read_record(records)
        if _last(records) != last or (now is not None and now.beat != holder.beat and not now.released):
            raise locked(records.address, now)
        holder = now


def _is_gone(holder: Holder) -> bool:
    """Whether the writer was a process of this boot of this host, and there is none of that number."""
    if holder.boot != boot_id():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
