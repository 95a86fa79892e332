"""Forks of a process that holds a checkpointer, and of one whose threads hold every lock of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from asyncckpt import Checkpointer, PendingSave
from asyncckpt.testing import GatedOps

STATE = {"w": torch.arange(300_000, dtype=torch.float32)}
#: A child ends within milliseconds, or never; a machine may be busy.
PATIENCE_SECONDS = 20.0


def in_child(what: Callable[[], object]) -> None:
    """Run ``what`` in a child that multiprocessing forks, and which ends as its children do. Fails where it raises or
    does not end."""

    def body() -> None:
        try:
            what()
        except BaseException as error:
            said.send(repr(error))
            raise
        said.send("")

    hears, said = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(PATIENCE_SECONDS)
    ended = not child.is_alive()
    if not ended:
        child.kill()
        child.join()
    assert (hears.recv() if hears.poll() else "it said nothing") == ""
    assert ended, "the child did not end"
    assert child.exitcode == 0
    said.close()
    hears.close()


@contextlib.contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Another thread holds these, as a writer or a committer may at any moment, and will never let go in a child."""
    has, done = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            has.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def locks_of(run: Checkpointer) -> list[Any]:
    """Every lock that a thread of a checkpointer may hold while another one forks."""
    lease = run._held.hold
    assert lease is not None
    pools = run._builder.pools
    return [
        run._arena._changed,
        run._committer._lock,
        run._in_flight._changed,
        run._quarantine._lock,
        run._reuse._lock,
        run._committer._pruner._lock,
        *(pool._lock for pool in (pools.writing, pools.small, pools.encoding, run._committer._pool)),
        *(pool._start_lock for pool in (pools.writing, pools.small, pools.encoding, run._committer._pool)),
        run._builder._encoder._changed,
        lease._stop._cond,
        lease._write_lock,
        run._steps._lock,
    ]


def gated_save(run: Checkpointer, state: dict[str, Any]) -> tuple[GatedOps, PendingSave]:
    """Step 2, which is not written before the operations' gate is opened."""
    run.wait()
    tidied = threading.Event()
    run._committer._pool.submit(tidied.set)
    assert tidied.wait(PATIENCE_SECONDS)
    run._store.ops = ops = GatedOps()
    return ops, run.save(2, state)
