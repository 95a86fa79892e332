"""A channel carries messages between the trainer and its background process, over a socket that only these two have.

Each message is framed by its length. What the trainer sends is pickled: its child has the same interpreter and the same
code, was started by it, and nobody else can write into the socket. What comes back is JSON, as the process that writes
also reads checkpoints, and nothing that it has read may decide what runs in the trainer. A unit of staged bytes is a
record of fixed size.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

_FRAME = struct.Struct("<BQ")
_UNIT = struct.Struct("<IIIHBIQQ")
_PICKLED, _JSON, _UNITS = 0, 1, 2
_READ_BYTES = 256 << 10
_MOST_DESCRIPTORS = 16
#: A process that takes nothing for so long is given up.
SEND_SECONDS = 60


class HandedUnit(NamedTuple):
    """A part of the arena that holds so many ``extents`` of a save, from index ``first`` on: ``nbytes`` at ``offset``
    of a region. ``split``: see ``StagingBuffer``. ``waiting``: how many threads of the trainer wait for memory."""

    save: int
    first: int
    extents: int
    region: int
    split: bool
    waiting: int
    offset: int
    nbytes: int


class Channel:
    """One end of the socket. ``send`` is thread-safe and ``receive`` is for one thread; both block. ``peer``: a
    descriptor of the process at the other end (``os.pidfd_open``), whose death ends the channel even where a process
    that was forked from it still has its socket."""

    def __init__(self, end: socket.socket, peer: int = -1) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()
        self._peer = peer
        seconds = struct.pack("ll", SEND_SECONDS, 0)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)

    def send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        """Send a message, pickled, and with it these descriptors, which stay open here too. Raises ``OSError`` where
        the other end is gone, or takes nothing for a minute."""
        self._send(_PICKLED, pickle.dumps(message, pickle.HIGHEST_PROTOCOL), descriptors)

    def send_json(self, message: dict[str, Any]) -> None:
        """Send a message as JSON; see ``send``."""
        self._send(_JSON, json.dumps(message).encode(), ())

    def send_units(self, units: Sequence[HandedUnit]) -> None:
        """Send units that are staged; see ``send``."""
        self._send(_UNITS, b"".join(_UNIT.pack(*unit) for unit in units), ())

    def _send(self, kind: int, payload: bytes, descriptors: Sequence[int]) -> None:
        head = _FRAME.pack(kind, len(payload))
        with self._lock:
            if descriptors:
                sent = socket.send_fds(self._socket, [head], list(descriptors))
                head = head[sent:]
            self._socket.sendall(head + payload)

    def receive(self) -> Any:
        """Return the next message: an object, or a list of units; None once the other end is gone and all that it has
        sent was returned. Blocks."""
        while True:
            found = self._next()
            if found is not None:
                return found[0]
            if not self._fill():
                return None

    def take_descriptor(self) -> int:
        """Return the next descriptor that came with a message; the caller closes it."""
        return self._descriptors.popleft()

    def close(self) -> None:
        """End the channel: the other end receives no more. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def close_here(self) -> None:
        """Close this process's copy of the socket alone, in a child that was forked. Takes no lock."""
        self._socket.close()

    def shut(self) -> None:
        """Send nothing more, and go on receiving. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _next(self) -> tuple[Any] | None:
        if len(self._buffer) < _FRAME.size:
            return None
        kind, nbytes = _FRAME.unpack_from(self._buffer)
        end = _FRAME.size + nbytes
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_FRAME.size : end])
        del self._buffer[:end]
        if kind == _UNITS:
            return ([HandedUnit(*fields)._replace(split=bool(fields[4])) for fields in _UNIT.iter_unpack(payload)],)
        return (pickle.loads(payload) if kind == _PICKLED else json.loads(payload),)

    def _fill(self) -> bool:
        flags = 0
        if self._peer >= 0:
            waiter = select.poll()
            waiter.register(self._socket, select.POLLIN)
            waiter.register(self._peer, select.POLLIN)
            ready = {fd for fd, _ in waiter.poll()}
            if self._socket.fileno() not in ready:  # it is gone: take what it had sent, and no more
                flags = socket.MSG_DONTWAIT
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS), flags | socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return False
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                count = len(content) // 4
                self._descriptors.extend(struct.unpack(f"{count}i", content[: 4 * count]))
        self._buffer += data
        return bool(data)


def watch(pid: int) -> int:
    """Return a descriptor that can be read once this process is gone, or -1 where the system has none such."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return -1
