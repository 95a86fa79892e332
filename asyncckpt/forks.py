"""A forked child leaves alone what it inherits from this process.

A child (a data loader's worker, a ``multiprocessing.Process``) has this process's memory and none of its threads: a
lock that one of them held is held there for ever, and whatever the child would end or give back still belongs to its
parent. So everything that acts by itself (at exit, when it is collected, on a signal) is disarmed there before the
child runs, and disarming takes no lock.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Disarmable(Protocol):
    """A disarmable object is one that a forked child inherits and must not use."""

    def disarm(self) -> None:
        """Make the object harmless. It is called in the child, which has one thread, and again in a child of the child.
        It takes no lock and blocks on nothing."""
        ...


class Closable(Protocol):
    """A closable object has threads, or other things of the process, to end."""

    def close(self) -> None: ...


_armed: weakref.WeakSet[Disarmable] = weakref.WeakSet()


def disarm_in_child(thing: Disarmable) -> None:
    """Have ``thing.disarm`` called in every child that is forked while ``thing`` lives."""
    _armed.add(thing)


def finalize(target: object, function: Callable[..., object], *args: Any) -> weakref.finalize[..., Any]:
    """Have ``function(*args)`` called once ``target`` is collected, or at exit, as ``weakref.finalize`` does, but only
    in this process: a forked child calls nothing. Returns the finalizer."""
    return weakref.finalize(target, _at_home, os.getpid(), function, *args)


def close_all(*things: Closable) -> None:
    """Close each of these, in order. A function that ``finalize`` can call: it keeps nothing else alive."""
    for thing in things:
        thing.close()


def _at_home(pid: int, function: Callable[..., object], *args: Any) -> None:
    if os.getpid() == pid:
        function(*args)


def _in_child() -> None:
    for thing in list(_armed):
        with contextlib.suppress(Exception):  # one that fails must not leave the others armed
            thing.disarm()


os.register_at_fork(after_in_child=_in_child)
