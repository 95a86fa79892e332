"""``python -m benchmarks.suites.light.worker returns DIRECTORY --tensors 24000`` makes one measurement.

It runs in a fresh process, and prints one JSON object a line on stdout, and nothing else: what libraries print goes to
stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from asyncckpt.catalog.retention import KeepLast
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.stage.options import StagingOptions
from asyncckpt.write.options import WriterOptions
from benchmarks.harness.raw import Ceiling, drop_page_cache
from benchmarks.harness.state import State, all_tensors
from benchmarks.suites.light.counting import Counter, FullCollections
from benchmarks.suites.light.state import adamw_state

#: Before anything is measured: tensors earn that they are deferred, plans are made, memory is faulted in.
WARM_SAVES: Final = 3
_PAUSE_SECONDS: Final = 0.3
_LOOP_SECONDS: Final = 6.0
#: An iteration of the loops that a save must not slow down.
_ITERATION_SECONDS: Final = 0.02

_WRITER: Final = WriterOptions()

Events = Iterator[dict[str, Any]]


def _warm(checkpointer: Checkpointer, state: State) -> int:
    """Save until saves are as they will be; return the last step."""
    checkpointer.watch(state["optimizer"])
    for step in range(1, WARM_SAVES + 1):
        checkpointer.save(step, state).result()
        state["optimizer"].step()
    return WARM_SAVES


def returns(directory: str, state: State, repeats: int) -> Events:
    """Measure how long ``save`` takes to return, and how long the next step waits, at most."""
    with Checkpointer(directory, keep=KeepLast(1)) as checkpointer:
        last = _warm(checkpointer, state)
        for step in range(last + 1, last + 1 + repeats):
            time.sleep(_PAUSE_SECONDS)
            quiet = _timed(state["optimizer"].step)
            with FullCollections() as collections:
                began = time.perf_counter()
                pending = checkpointer.save(step, state)
                returned = time.perf_counter()
                waited = _timed(state["optimizer"].step)
                report = pending.result()
            yield {
                "kind": "save",
                "return_seconds": returned - began,
                "step_seconds": waited,
                "quiet_step_seconds": quiet,
                "durable_seconds": report.durable_seconds,
                "full_collections": collections.count,
            }


def interpreter(directory: str, state: State, repeats: int, writer: WriterOptions = _WRITER) -> Events:
    """Measure what a thread that counts in pure Python loses to a save, until that is durable."""
    with Checkpointer(directory, keep=KeepLast(1), writer=writer) as checkpointer, Counter() as counter:
        last = _warm(checkpointer, state)
        for step in range(last + 1, last + 1 + repeats):
            time.sleep(_PAUSE_SECONDS)
            counter.stretch()
            time.sleep(_LOOP_SECONDS / 6)
            before = counter.stretch()
            with FullCollections() as collections:
                counter.stretch()
                report = checkpointer.save(step, state).result()
                during = counter.stretch()
            time.sleep(_LOOP_SECONDS / 6)
            after = counter.stretch()
            yield {
                "kind": "counted",
                "lost_seconds": during.lost_seconds,
                "quiet_lost_share": (before.lost_seconds + after.lost_seconds) / (before.seconds + after.seconds),
                "longest_seconds": during.longest_seconds,
                "quiet_longest_seconds": max(before.longest_seconds, after.longest_seconds),
                "durable_seconds": report.durable_seconds,
                "full_collections": collections.count,
            }


def loops(directory: str, state: State, repeats: int, writer: WriterOptions = _WRITER) -> Events:
    """Measure a loop that is bound by Python on one busy thread, and one that waits for a device, saving always and not
    at all by turns."""
    for kind, iterate in (("busy", _compute), ("device", lambda: time.sleep(_ITERATION_SECONDS))):
        with Checkpointer(os.path.join(directory, kind), keep=KeepLast(1), writer=writer) as checkpointer:
            last = _warm(checkpointer, state)
            for _ in range(repeats):
                quiet, _ = _looped(iterate, None)
                step = last

                def save(checkpointer: Checkpointer = checkpointer) -> Any:
                    nonlocal step
                    step += 1
                    return checkpointer.save(step, state)

                saving, saves = _looped(iterate, save)
                last = step
                yield {"kind": "loop", "loop": kind, "slower": quiet / saving - 1, "saves": saves}


def restores(directory: str, state: State, repeats: int) -> Events:
    """Measure restoring into live objects."""
    with Checkpointer(directory, keep=KeepLast(1)) as checkpointer:
        checkpointer.save(1, state).result()
        for _ in range(repeats):
            drop_page_cache(directory)
            seconds = _timed(lambda: checkpointer.restore(state, step=1))
            yield {"kind": "restore", "restore_seconds": seconds}


def eager(directory: str, state: State, repeats: int) -> Events:
    """Measure the stall of saves that copy everything before they return, and a warm memcpy of the same bytes."""
    ceiling = Ceiling(all_tensors(state), directory)
    try:
        with Checkpointer(os.path.join(directory, "run"), keep=KeepLast(1)) as checkpointer:
            for step in range(1, repeats + WARM_SAVES + 1):
                copies = [ceiling.copy() for _ in range(3)]
                began = time.perf_counter()
                pending = checkpointer.save(step, state)
                stall = time.perf_counter() - began
                pending.result()
                copies += [ceiling.copy() for _ in range(3)]
                if step > WARM_SAVES:
                    yield {"kind": "eager", "stall_seconds": stall, "copy_seconds": statistics.median(copies)}
    finally:
        ceiling.close()


def durable(
    directory: str, state: State, repeats: int, writer: WriterOptions = _WRITER, budget_bytes: int | None = None
) -> Events:
    """Measure saves that nothing else waits for, and raw writes of the same bytes, by turns; those from small pages,
    too, as the memory is that a background process writes from."""
    ceiling = Ceiling(all_tensors(state), os.path.join(directory, "huge"))
    small = Ceiling(all_tensors(state), os.path.join(directory, "small"), small_pages=True)
    try:
        options = StagingOptions(budget_bytes=budget_bytes) if budget_bytes else StagingOptions()
        run = os.path.join(directory, "run")
        with Checkpointer(run, keep=KeepLast(1), staging=options, writer=writer) as checkpointer:
            checkpointer.watch(state["optimizer"])
            raw = ceiling.write()
            for step in range(1, repeats + WARM_SAVES + 1):
                report = checkpointer.save(step, state).result()
                checkpointer.wait()
                state["optimizer"].step()
                before, raw = raw, ceiling.write()
                if step > WARM_SAVES:
                    yield {
                        "kind": "durable",
                        "nbytes": report.nbytes,
                        "durable_seconds": report.durable_seconds,
                        "raw_seconds": (before + raw) / 2,
                        "raw_small_pages_seconds": small.write(),
                    }
    finally:
        ceiling.close()
        small.close()


def budget(directory: str, state: State, repeats: int, writer: WriterOptions = _WRITER) -> Events:
    """Measure ``durable`` with staging memory that holds a small part of the state."""
    return durable(directory, state, repeats, writer, budget_bytes=256 << 20)


def first_step(directory: str, state: State, repeats: int) -> Events:
    """Measure the seconds from the start of a process to its first resumed step, in parts."""
    tensors, items = _size_of(state)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, state).result()
    command = [sys.executable, "-m", "benchmarks.suites.light.resumed", directory, str(tensors), str(items)]
    for _ in range(repeats):
        drop_page_cache(directory)
        began = time.time()
        done = subprocess.run([*command, repr(began)], stdout=subprocess.PIPE, check=True, text=True)
        yield {"kind": "first_step", **json.loads(done.stdout.splitlines()[-1])}


SCENARIOS: Final[dict[str, Callable[..., Events]]] = {
    "returns": returns,
    "interpreter": interpreter,
    "loops": loops,
    "restores": restores,
    "eager": eager,
    "durable": durable,
    "budget": budget,
    "first_step": first_step,
}


def _size_of(state: State) -> tuple[int, int]:
    tensors = all_tensors(state)
    return len(tensors), max(tensor.numel() for tensor in tensors)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _compute() -> None:
    ends = time.thread_time() + _ITERATION_SECONDS
    total = 0
    while time.thread_time() < ends:
        for number in range(1000):
            total += number


def _looped(iterate: Callable[[], None], save: Callable[[], Any] | None) -> tuple[float, int]:
    """Run a loop for some seconds, saving again as soon as the save before is durable; return its iterations a second,
    and how many saves were begun."""
    began, iterations, saves = time.perf_counter(), 0, 0
    pending: Any = None
    while time.perf_counter() - began < _LOOP_SECONDS:
        if save is not None and (pending is None or pending.done()):
            pending = save()
            saves += 1
        iterate()
        iterations += 1
    rate = iterations / (time.perf_counter() - began)
    if pending is not None:
        pending.result()
    return rate, saves


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.light.worker", description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("directory", help="on the file system to measure; what is written there is removed again")
    parser.add_argument("--tensors", type=int, default=600)
    parser.add_argument("--items", type=int, default=256, help="float32 values of a tensor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--process", choices=("auto", "always", "never"), help="who writes; not for all scenarios")
    options = parser.parse_args()
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    directory = tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=options.directory)
    state = adamw_state(options.tensors, options.items)
    try:
        more = {"writer": WriterOptions(process=options.process)} if options.process else {}
        for event in SCENARIOS[options.scenario](directory, state, options.repeats, **more):
            lines.write(json.dumps(event) + "\n")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lines.close()


if __name__ == "__main__":
    main()
