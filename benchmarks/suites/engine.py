"""A worker process measures these scenarios. Each yields its figures one by one, as it gets them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers
from benchmarks.harness import memory
from benchmarks.harness.raw import Ceiling, drop_page_cache
from benchmarks.harness.runner import Event
from benchmarks.harness.state import State, all_tensors, plain_state, same_bits, training_state
from benchmarks.suites import drag

#: About one training step of that model on two cores: a run has this time between ``prepare`` and its first save.
STEP_SECONDS = 4.0
STAGING_BYTES = 256 << 20
#: 20,480 tensors of 64 KiB and 20 of 64 MiB are the same bytes.
MANY = (20_480, 64 << 10)
FEW = (20, 64 << 20)
TIMEOUT_SECONDS = 300.0
COPIES = 3


def saves(peer: str, size: str, directory: str, repeats: int) -> Iterator[Event]:
    """Measure a fresh process's first save, then the next, each between two raw writes."""
    state = training_state(size)
    ceiling = _ceiling(state, directory)
    yield _describe(state)
    yield from _raw(ceiling)
    session = _setup(peer, state, directory)
    yield {"kind": "ready"}
    time.sleep(STEP_SECONDS)
    for number in range(1, repeats + 1):
        yield _save(session, number)
        yield from _raw(ceiling)
    session.close()


def returns(peer: str, size: str, directory: str, repeats: int) -> Iterator[Event]:
    """Measure how long ``save`` holds its caller, over many saves with training between them.

    ``optimizer.step`` runs after each, as in a loop: a deferred save has to guard against it.
    """
    state = training_state(size)
    yield _describe(state)
    session = _setup(peer, state, directory)
    time.sleep(STEP_SECONDS)
    for number in range(1, repeats + 1):
        yield _save(session, number)
        with session.guard():
            state["optimizer"].step()
    session.close()


def many(peer: str, size: str, directory: str, repeats: int) -> Iterator[Event]:
    """Save the same bytes in many small and in few large tensors, by turns. ``small`` takes a sixteenth of both."""
    scale = 16 if size == "small" else 1
    states = {
        "few": plain_state(FEW[0], FEW[1] // scale),
        "many": plain_state(MANY[0] // scale, MANY[1]),
    }
    ceiling = _ceiling(states["few"], directory)
    sessions = {name: _setup(peer, state, os.path.join(directory, name)) for name, state in states.items()}
    for name, state in states.items():
        yield {**_describe(state), "state": name}
    time.sleep(STEP_SECONDS)
    for number in range(1, repeats + 1):
        for name, session in sessions.items():
            yield from _raw(ceiling)
            yield {**_save(session, number), "state": name}
    for session in sessions.values():
        session.close()


def budget(peer: str, size: str, directory: str, repeats: int) -> Iterator[Event]:
    """Measure peak resident memory above the state's, through a small arena, and whether what was saved is
    bit-equal."""
    state = training_state(size)
    module: Any = peers.load(peer)
    yield _describe(state)
    memory.settle()
    before = memory.resident_bytes()
    with memory.watch_peak() as peak:
        session = module.setup(state, _made(directory, "run"), staging_bytes=STAGING_BYTES)
        for number in range(1, repeats + 1):
            yield _save(session, number)
    yield {
        "kind": "memory",
        "staging_bytes": STAGING_BYTES,
        "above_state_bytes": peak.rss_bytes - before,
        "shared_bytes": peak.shmem_bytes,
        "state_rss_bytes": before,
    }
    yield {"kind": "equal", "equal": _restores_equal(session, state, repeats)}
    session.close()


def restores(peer: str, size: str, directory: str, repeats: int) -> Iterator[Event]:
    """Restore into live objects, with the page cache dropped, by turns with a raw cold read of the same bytes."""
    state = training_state(size)
    ceiling = _ceiling(state, directory)
    yield _describe(state)
    session = _setup(peer, state, directory)
    yield _save(session, 1)
    ceiling.write()
    yield {"kind": "equal", "equal": _restores_equal(session, state, 1)}
    for _ in range(repeats):
        yield {"kind": "raw_read", "seconds": ceiling.read(), "nbytes": ceiling.nbytes}
        drop_page_cache(session.directory)
        began = time.perf_counter()
        session.restore(1)
        yield {"kind": "restore", "seconds": time.perf_counter() - began}
    session.close()


def dragging(peer: str, size: str, directory: str, repeats: int) -> Iterator[Event]:
    """Measure a real training loop, with and without a save in flight."""
    state = training_state(size)
    yield _describe(state)
    session = _setup(peer, state, directory)
    time.sleep(STEP_SECONDS)
    for figures in drag.measure(session, repeats):
        yield {"kind": "drag", **figures}
    session.close()


SCENARIOS: dict[str, Callable[[str, str, str, int], Iterator[Event]]] = {
    "saves": saves,
    "returns": returns,
    "many": many,
    "budget": budget,
    "restores": restores,
    "drag": dragging,
}


def _setup(peer: str, state: State, directory: str) -> peers.Session:
    return peers.load(peer).setup(state, _made(directory, "run"))


def _made(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    os.makedirs(path)
    return path


def _ceiling(state: State, directory: str) -> Ceiling:
    return Ceiling(all_tensors(state), os.path.join(directory, "raw"))


def _describe(state: State) -> Event:
    tensors = all_tensors(state)
    return {"kind": "state", "nbytes": sum(tensor.nbytes for tensor in tensors), "tensors": len(tensors)}


def _raw(ceiling: Ceiling) -> Iterator[Event]:
    # the best of some: a copy that something else disturbed is not a ceiling, and flatters what it is compared with
    seconds = min(ceiling.copy() for _ in range(COPIES))
    yield {"kind": "copy", "seconds": seconds, "nbytes": ceiling.nbytes}
    yield {"kind": "raw", "seconds": ceiling.write(), "nbytes": ceiling.nbytes}


def _save(session: peers.Session, number: int) -> Event:
    saved = session.save(number)
    durable_seconds = saved.durable.result(TIMEOUT_SECONDS)
    # every peer keeps one checkpoint: the older one goes once the newer one is durable, and not on anyone's time
    session.forget(number - 1)
    return {
        "kind": "save",
        "number": number,
        "stall_seconds": saved.stall_seconds,
        "durable_seconds": durable_seconds,
    }


def _restores_equal(session: peers.Session, state: State, step: int) -> bool:
    expected = [tensor.detach().clone() for tensor in all_tensors(state)]
    with torch.no_grad():
        for tensor in all_tensors(state):
            tensor.zero_()
    drop_page_cache(session.directory)
    session.restore(step)
    return all(same_bits(a, b) for a, b in zip(expected, all_tensors(state), strict=True))
