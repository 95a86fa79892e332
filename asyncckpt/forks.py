"""What a forked child does with what it has inherited: nothing.

A child (a data loader's worker, a ``multiprocessing.Process``) has this process's memory and none of its threads: a
lock that one of them held is held there for ever, and whatever the child would end or give back is still its parent's.
So everything that acts by itself (at exit, when it is collected, on a signal) is disarmed there before the child runs,
and disarming takes no lock.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Disarmable(Protocol):
    """Something that a forked child inherits and must not use."""

    def disarm(self) -> None:
        """Called in the child, which has one thread. Takes no lock, blocks on nothing, and may be called again in a
        child of the child."""
        ...


_armed: weakref.WeakSet[Disarmable] = weakref.WeakSet()


def disarm_in_child(thing: Disarmable) -> None:
    """Have ``thing.disarm`` called in every child that is forked while ``thing`` lives."""
    _armed.add(thing)


def finalize(target: object, function: Callable[..., object], *args: Any) -> weakref.finalize[..., Any]:
    """As ``weakref.finalize``, for what only this process may do: in a forked child nothing is called."""
    return weakref.finalize(target, _at_home, os.getpid(), function, *args)


def _at_home(pid: int, function: Callable[..., object], *args: Any) -> None:
    if os.getpid() == pid:
        function(*args)


def _in_child() -> None:
    for thing in list(_armed):
        with contextlib.suppress(Exception):  # the others have to be disarmed all the same
            thing.disarm()


os.register_at_fork(after_in_child=_in_child)
