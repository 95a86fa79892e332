"""A process talks to its job's store over one connection, whatever threads and checkpointers it has.

A connection costs more than it seems: torch looks up the name of the other side for each, and resolvers drop questions
that many ranks ask at once, which takes them five seconds. So there is one a process, and nobody waits for it: until it
is there, the connection that the job has anyway is used.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeAlias

import torch

from asyncckpt import forks, interrupts
from asyncckpt.errors import RankLost

#: Neighbours among the ranks, which share a host and its resolver, connect so long after each other.
_TURN_SECONDS = 0.01
_LONGEST_TURN_SECONDS = 5.0
_MANY = "multi_get"
_Call: TypeAlias = tuple[str, tuple[Any, ...], Future[Any]]


class Connection:
    """A connection to a store of ``torch.distributed`` on which every call ends. Thread-safe; calls are answered one
    after the other.

    A store whose process was stopped, or whose host is gone, never answers, and torch waits for it whatever timeout it
    was given. So calls run on a thread of their own. They raise ``RankLost`` where the store does not answer in time or
    is gone. ``turn``: which of the job's processes this is; they connect one after the other."""

    def __init__(self, store: Any, turn: int = 0) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        #: When the call that the store has not answered yet was made, by ``time.monotonic``; empty where it has.
        self._unanswered_since: list[float] = []
        arguments = (store, self._calls, self._unanswered_since, min(turn * _TURN_SECONDS, _LONGEST_TURN_SECONDS))
        threading.Thread(target=_serve, args=arguments, name="asyncckpt-store", daemon=True).start()
        forks.finalize(self, self._calls.put, None)

    def call(self, timeout_seconds: float, name: str, *args: Any) -> Any:
        """Call a method of the store and return its result. Blocks for one round trip, and for calls made before it."""
        since = next(iter(self._unanswered_since), None)
        if since is not None and time.monotonic() - since >= timeout_seconds:
            raise _silent(timeout_seconds)
        future: Future[Any] = Future()
        self._calls.put((name, args, future))
        interrupts.wait_for(lambda seconds: bool(wait([future], seconds)[0]), timeout_seconds)
        if not future.done():
            future.cancel()  # nobody waits for it any more, should the store come back
            raise _silent(timeout_seconds)
        try:
            return future.result()
        except (RuntimeError, torch.distributed.DistError) as error:
            raise RankLost(f"the job's store is gone, and with it the process that ran it ({error})") from error


class JobMessages:
    """Has the messages under one prefix of a job's store. ``timeout_seconds``: how long a call waits for the store at
    most. Thread-safe. Each call blocks for one round trip, and raises ``RankLost`` as ``Connection.call`` does."""

    def __init__(self, connection: Connection, prefix: str, timeout_seconds: float) -> None:
        self._connection = connection
        self._prefix = prefix
        self._timeout_seconds = timeout_seconds

    def below(self, prefix: str) -> JobMessages:
        """Return those under a prefix below this one."""
        return JobMessages(self._connection, self._key(prefix), self._timeout_seconds)

    def within(self, timeout_seconds: float) -> JobMessages:
        """Return the same messages with another timeout."""
        return JobMessages(self._connection, self._prefix, timeout_seconds)

    def set(self, key: str, value: bytes) -> None:
        """Leave a message."""
        self._connection.call(self._timeout_seconds, "set", self._key(key), value)

    def get(self, key: str) -> bytes:
        """Return a message that is there."""
        return bytes(self._connection.call(self._timeout_seconds, "get", self._key(key)))

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """Return messages that are there, in the order of their keys. One round trip for all where the store can."""
        if not keys:
            return []
        return list(map(bytes, self._connection.call(self._timeout_seconds, _MANY, list(map(self._key, keys)))))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these messages are there."""
        return bool(self._connection.call(self._timeout_seconds, "check", list(map(self._key, keys))))

    def delete_key(self, key: str) -> None:
        """Take a message out, if it is there."""
        self._connection.call(self._timeout_seconds, "delete_key", self._key(key))

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key


#: The connections to the stores that checkpointers use, by the identity of the store: each keeps its store alive.
_connections: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()
_connections_lock = threading.Lock()


def connection_to(store: Any, turn: int) -> Connection:
    """Return this process's connection to a store, which is made for the first that asks; see ``Connection`` for
    ``turn``. Never blocks."""
    with _connections_lock:
        found = _connections.get(id(store))
        if found is None:
            found = _connections[id(store)] = Connection(store, turn)
        return found


def _silent(timeout_seconds: float) -> RankLost:
    return RankLost(
        f"the job's store did not answer within {timeout_seconds:.0f} s: the process that runs it was stopped, or its "
        f"host is gone"
    )


def _serve(
    store: Any, calls: queue.SimpleQueue[_Call | None], unanswered_since: list[float], delay_seconds: float
) -> None:
    own: list[Any] = []
    arguments = (store, own, delay_seconds)
    threading.Thread(target=_connect, args=arguments, name="asyncckpt-store-connect", daemon=True).start()
    while (call := calls.get()) is not None:
        name, args, future = call
        if future.set_running_or_notify_cancel():
            unanswered_since.append(time.monotonic())
            try:
                there = own[0] if own else store
                future.set_result(_get_many(there, *args) if name == _MANY else getattr(there, name)(*args))
            except BaseException as error:
                future.set_exception(error)
            finally:
                unanswered_since.clear()
        del call, args, future


def _get_many(store: Any, keys: Sequence[str]) -> Sequence[bytes]:
    if getattr(store, "has_extended_api", bool)():
        found: Sequence[bytes] = store.multi_get(keys)
        return found
    return [store.get(key) for key in keys]


def _connect(store: Any, own: list[Any], delay_seconds: float) -> None:
    """Make a connection beside the one that training uses, which may hold that for as long as it waits for another
    rank. Where there can be none, that one stays in use."""
    time.sleep(delay_seconds)
    try:
        own.append(store.clone())
    except Exception:  # a store that cannot be cloned, or that is gone: the calls say so
        return
