"""Each peer is a module with a ``LABEL`` and ``setup(state, directory)``.

``setup`` returns a session: ``save(step)``, ``restore()``, ``guard()`` and ``close()``. To add a peer, add its module
and its name here. Durable means the same for all of them: every file and every directory that was written is fsynced.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.harness.raw import sync_directory
from benchmarks.harness.state import State

NAMES = (
    "asyncckpt",
    "asyncckpt_deferred",
    "torch_save",
    "safetensors_file",
    "dcp_save",
    "dcp_async_thread",
    "dcp_async_process",
    "torch_checkpointing",
)


@dataclass(frozen=True, slots=True)
class Saved:
    """``stall_seconds`` says how long ``save`` held its caller, ``durable`` how many seconds passed from the call until
    all was fsynced."""

    stall_seconds: float
    durable: Future[float]


class Session(ABC):
    """A session is one peer set up for one state. ``save`` is called again only after the last save is durable."""

    def __init__(self, state: State, directory: str) -> None:
        self.state = state
        self.directory = directory

    @abstractmethod
    def save(self, step: int) -> Saved:
        """Save into ``self.path(step)`` as the peer's documentation advises; return as soon as training may go on."""

    def restore(self, step: int) -> None:
        """Load that step back into the live state. Some peers' restore is not measured."""
        raise LookupError(f"restore is not measured for {type(self).__name__}")

    def guard(self) -> AbstractContextManager[object]:
        """Return what the peer asks to be put round ``optimizer.step``."""
        return nullcontext()

    def forget(self, step: int) -> None:
        """Delete that step's checkpoint, between measurements; return when it is gone."""
        shutil.rmtree(self.path(step), ignore_errors=True)

    def close(self) -> None:  # noqa: B027  most peers have nothing to end
        """End threads and processes."""

    def path(self, step: int) -> str:
        return os.path.join(self.directory, f"step-{step:08d}")


class Peer(Protocol):
    """A peer's module offers these."""

    LABEL: str

    def setup(self, state: State, directory: str) -> Session: ...


def load(name: str) -> Peer:
    """Import the peer's module. Raises ``ImportError`` where what it measures is not installed."""
    if name not in NAMES:
        raise ValueError(f"unknown peer {name!r}; known are {', '.join(NAMES)}")
    module: Peer = importlib.import_module(f"benchmarks.peers.{name}")
    return module


def blocking(work: Callable[[], None], path: str) -> Saved:
    """Make a save that returns when it is durable, of ``work`` and an fsync of everything below ``path``."""
    began = time.perf_counter()
    work()
    sync_tree(path)
    seconds = time.perf_counter() - began
    durable: Future[float] = Future()
    durable.set_result(seconds)
    return Saved(seconds, durable)


def in_background(began: float, written: Future[Any], path: str) -> Saved:
    """Make a save that began at ``began`` and returns now; its files below ``path`` are fsynced once ``written`` is
    done."""
    stall_seconds = time.perf_counter() - began
    durable: Future[float] = Future()

    def finish(done: Future[Any]) -> None:
        try:
            done.result()
            sync_tree(path)
        except BaseException as error:
            durable.set_exception(error)
        else:
            durable.set_result(time.perf_counter() - began)

    written.add_done_callback(finish)
    return Saved(stall_seconds, durable)


def sync_tree(path: str) -> None:
    """Fsync every file and directory from ``path`` down, then its parent."""
    for at, _, names in os.walk(path, topdown=False):
        for name in names:
            fd = os.open(os.path.join(at, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(at)
    sync_directory(os.path.dirname(path))
