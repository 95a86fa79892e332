"""Rank processes for tests: forked from a server that has torch imported, given one scenario after the other.

A scenario is a module-level function ``scenario(me, *args)`` that every rank runs; what it returns or raises comes back
as an ``Outcome``. A ``Fault`` kills or stops one rank at a point that the scenario names with ``me.at(point)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch
import torch.distributed as dist

Scenario = Callable[..., Any]

#: Processes are forked from one that has imported what they need, and that has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint.state_dict",
        "asyncckpt.checkpointer",
        "asyncckpt.testing",
        "asyncckpt.formats.zarr",
        "zarr",
        "torch._dynamo",
    ]
)
#: Of process group set-up and of training's own collectives. Longer than any save's deadline in these tests.
_GLOO_SECONDS = 60.0
#: The most rank processes at one time: a crew of each size from one to four, and one of four that a test has alone.
MAX_RANKS = 14


@dataclass(frozen=True)
class Fault:
    """What happens to ``rank`` the ``nth`` time it comes to ``point``: ``kill``, ``stop`` (SIGSTOP) or ``raise`` of
    ``error``."""

    rank: int
    point: str
    how: str = "kill"
    nth: int = 1
    error: BaseException | None = None


@dataclass
class Me:
    """A rank, as its scenario sees it. Made once a process: ``kept`` outlives scenarios."""

    rank: int
    size: int
    fault: Fault | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    #: How often each point was passed in this scenario.
    passed: dict[str, int] = field(default_factory=dict)

    def at(self, point: str) -> None:
        """A point that tests know by name."""
        count = self.passed[point] = self.passed.get(point, 0) + 1
        fault = self.fault
        if fault is None or (fault.rank, fault.point, fault.nth) != (self.rank, point, count):
            return
        if fault.error is not None:
            raise fault.error
        # to this very thread, so that it does not come past this line first
        signal.pthread_kill(threading.get_ident(), signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)


@dataclass(frozen=True)
class Outcome:
    """What became of a scenario on one rank. ``error``: names of the exception's class and its bases, first the class
    itself. ``gone``: the process died; ``silent``: it had not answered when the deadline came."""

    rank: int
    value: Any = None
    error: tuple[str, ...] = ()
    message: str = ""
    trace: str = ""
    gone: bool = False
    silent: bool = False

    @property
    def ok(self) -> bool:
        return not (self.error or self.gone or self.silent)

    def failed_with(self, name: str) -> bool:
        """Whether it raised this class or one derived from it."""
        return name in self.error


class Crew:
    """``size`` rank processes of one job. Close it; it is a context manager.

    ``store``: ``agent``, as torchrun has it (this process serves it, whatever becomes of the ranks), ``rank0``, or
    ``file``. ``spaces``: for each rank a network namespace, its interface, and, once, the address of rank 0.
    """

    def __init__(
        self,
        size: int,
        *,
        store: str = "agent",
        folder: str = "",
        spaces: Sequence[tuple[str, str]] = (),
        address: str = "127.0.0.1",
    ) -> None:
        self.size = size
        self.usable = True
        self._server: Any = None
        place: dict[str, Any] = {"kind": store, "address": address, "folder": folder}
        if store == "agent" and size > 1:
            self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place["port"] = self._server.port
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(size):
            if store == "rank0" and rank == 1:
                place["port"] = self._links[0].recv()
            ours, theirs = CONTEXT.Pipe()
            space = spaces[rank] if spaces else None
            process = CONTEXT.Process(target=_live, args=(theirs, rank, size, place, space), daemon=True)
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)
        if store == "rank0" and size == 1:
            self._links[0].recv()

    # -- scenarios ---------------------------------------------------------------------------------------------------

    def start(self, scenario: Scenario, *args: Any, fault: Fault | None = None) -> None:
        """Give every rank that lives a scenario; ``collect`` gets what became of it."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send((scenario, args, fault))

    def collect(self, timeout: float = 60.0, *, without: Sequence[int] = ()) -> list[Outcome]:
        """What became of the scenario on each rank, in order; the ranks ``without`` are not waited for."""
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        waiting = {link: rank for rank, link in enumerate(self._links) if rank not in without}
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for link in wait(list(waiting), remaining):
                rank = waiting.pop(link)  # type: ignore[call-overload]
                try:
                    found[rank] = link.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    found[rank] = Outcome(rank, gone=True)
        outcomes = [found.get(rank, Outcome(rank, silent=True)) for rank in range(self.size)]
        self.usable = self.usable and not any(one.gone or one.silent for one in outcomes)
        return outcomes

    def run(self, scenario: Scenario, *args: Any, timeout: float = 60.0, fault: Fault | None = None) -> list[Outcome]:
        """Run a scenario on all ranks; never raises what they raise."""
        without = [fault.rank] if fault is not None and fault.how == "stop" else []
        self.start(scenario, *args, fault=fault)
        return self.collect(timeout, without=without)

    def values(self, scenario: Scenario, *args: Any, timeout: float = 60.0) -> list[Any]:
        """What the scenario returned, by rank. Fails the test where a rank raised, died or was silent."""
        outcomes = self.run(scenario, *args, timeout=timeout)
        bad = [one for one in outcomes if not one.ok]
        if bad:
            self.usable = False  # the others may be in the middle of a collective
        assert not bad, "\n".join(
            f"rank {one.rank} of {self.size}: {'died' if one.gone else 'no answer' if one.silent else one.trace}"
            for one in bad
        )
        return [one.value for one in outcomes]

    # -- processes ---------------------------------------------------------------------------------------------------

    def signal(self, rank: int, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP or SIGCONT for one rank, where it lives."""
        self.usable = False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._processes[rank].pid, number)

    def wait_stopped(self, rank: int, timeout: float = 30.0) -> None:
        """Block until a rank that stops itself has."""
        deadline = time.monotonic() + timeout
        while _state_of(self._processes[rank].pid) != "T":
            assert time.monotonic() < deadline, f"rank {rank} did not come to the point where it was to stop"
            time.sleep(0.01)

    def close(self) -> None:
        """End all ranks. Idempotent."""
        self.usable = False
        for link in self._links:
            with contextlib.suppress(OSError):
                link.close()
        for process in self._processes:
            process.join(0.2)
            if process.exitcode is None:
                process.kill()  # stopped ones too
                process.join(30)
        self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Crews:
    """Crews that live from test to test: a fork and a process group each, instead of one a test."""

    def __init__(self) -> None:
        self._kept: dict[int, Crew] = {}

    def __call__(self, size: int) -> Crew:
        """A crew of that size that nothing has happened to. At most ``MAX_RANKS`` processes live at once."""
        crew = self._kept.pop(size, None)
        if crew is not None and not crew.usable:
            crew.close()
            crew = None
        if crew is None:
            self.leave_room(size)
            crew = Crew(size)
        self._kept[size] = crew
        return crew

    def leave_room(self, ranks: int) -> None:
        """End crews, the least used first, until ``ranks`` more processes may be started."""
        while self._kept and sum(self._kept) + ranks > MAX_RANKS:
            self._kept.pop(next(iter(self._kept))).close()

    def close(self) -> None:
        self.leave_room(MAX_RANKS)


# -- in the rank's process -----------------------------------------------------------------------------------------


def begin() -> None:
    """The first thing in a process that was forked from the server."""
    gc.freeze()  # what was imported before: a look at all of that costs more than a scenario, and copies it
    CONTEXT.set_forkserver_preload(["torch"])  # of a server of its own, which a data loader has
    torch.set_num_threads(1)  # with several, tiny layers spend their time waiting for each other


def _live(link: Connection, rank: int, size: int, place: dict[str, Any], space: tuple[str, str] | None) -> None:
    begin()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if space is not None:
        _enter(space[0])
        os.environ["GLOO_SOCKET_IFNAME"] = space[1]
    if size > 1:
        store = _store(link, rank, place)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_GLOO_SECONDS)
        )
    elif place["kind"] == "rank0":
        link.send(0)
    me = Me(rank, size)
    for scenario, args, fault in _tasks(link):
        me.fault, me.passed = fault, {}
        try:
            outcome = Outcome(rank, value=scenario(me, *args))
        except BaseException as error:
            names = tuple(kind.__name__ for kind in type(error).__mro__)
            outcome = Outcome(rank, error=names, message=str(error), trace=traceback.format_exc())
        try:
            link.send(outcome)
        except OSError:
            break
    sys.stdout.flush()
    os._exit(0)  # a process group is not to be taken down in order by whoever is left


def _tasks(link: Connection) -> Iterator[tuple[Scenario, tuple[Any, ...], Fault | None]]:
    while True:
        try:
            yield link.recv()
        except (EOFError, OSError):
            return


def _store(link: Connection, rank: int, place: dict[str, Any]) -> Any:
    timeout = timedelta(seconds=_GLOO_SECONDS)
    if place["kind"] == "file":
        return dist.FileStore(os.path.join(place["folder"], "store"))
    leads = place["kind"] == "rank0" and rank == 0
    store = dist.TCPStore(
        place["address"], place.get("port", 0), is_master=leads, wait_for_workers=False, timeout=timeout
    )
    if leads:
        link.send(store.port)
    return store


def _enter(space: str) -> None:
    """Move this thread, and all threads that it will start, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{space}") as namespace:
        if libc.setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"setns({space})")


def _state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
