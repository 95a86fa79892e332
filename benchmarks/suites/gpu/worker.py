"""``python -m benchmarks.suites.gpu.worker loop DIRECTORY --contender device`` makes one measurement.

It runs in a fresh process, and prints one JSON object a line on stdout, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import torch

from benchmarks.harness.memory import resident_bytes, settle
from benchmarks.harness.raw import Ceiling, drop_page_cache
from benchmarks.harness.state import State, all_tensors
from benchmarks.peers import Session
from benchmarks.peers.asyncckpt import Asyncckpt
from benchmarks.suites.gpu.contenders import CONTENDERS, NOTHING
from benchmarks.suites.gpu.state import calibrated, gpt_state, many_state, trainer
from benchmarks.suites.gpu.windows import FIRST, Window, measure
from benchmarks.suites.light.counting import Counter

Events = Iterator[dict[str, Any]]
#: An iteration of the loop takes about so long.
_WANTED_SECONDS: Final = 0.1
_WARM_ITERATIONS: Final = 5
#: The windows without a save have as many iterations as one with a save has, about.
_NOTHING_ITERATIONS: Final = 45
#: A raw write or read of so many bytes is the disk's ceiling.
_RAW_BYTES: Final = 4 << 30
_CHUNK_BYTES: Final = 64 << 20
_PATIENCE_SECONDS: Final = 120.0
#: The first saves set memory aside and compile a kernel; a watched tensor is deferred from the second one on.
_WARM_SAVES: Final = 2


def loop(state: State, directory: str, device: str, contender: str, saves: int, batch: int = 0) -> Events:
    """Train, with saves of a contender, or with none. ``batch``: sequences of a batch; 0 has it found out."""
    batch = batch or calibrated(state, device, _WANTED_SECONDS)
    iterate = trainer(state, device, batch)
    for _ in range(_WARM_ITERATIONS):
        iterate()
    nbytes = sum(tensor.nbytes for tensor in all_tensors(state))
    yield {"kind": "state", "nbytes": nbytes, "tensors": len(all_tensors(state)), "batch": batch}
    if contender == NOTHING:
        for _ in range(2 * saves):
            yield _window(measure(iterate, None, least=_NOTHING_ITERATIONS))
        return
    settle()
    before = _reserved(device), resident_bytes()
    session = CONTENDERS[contender](state, directory)
    guarded = trainer(state, device, batch, session.guard)
    for step in range(1, _WARM_SAVES + 1):
        session.save(step).durable.result(_PATIENCE_SECONDS)
        guarded()
    yield {
        "kind": "memory",
        "device_bytes": _reserved(device) - before[0],
        "host_bytes": resident_bytes() - before[1],
    }
    for step in range(_WARM_SAVES + 1, _WARM_SAVES + 1 + saves):
        held: list[Future[float]] = []

        def save(step: int = step, held: list[Future[float]] = held) -> Callable[[], bool]:
            held.append(session.save(step).durable)
            return held[0].done

        window = measure(guarded, save, least=FIRST)
        yield {**_window(window), "durable_seconds": held[0].result()}
        session.forget(step - 1)
    yield {"kind": "reserved", "device_bytes": _reserved(device) - before[0]}
    yield from _alone(session, step + 1, nbytes)
    session.close()


def _window(window: Window) -> dict[str, Any]:
    return {
        "kind": "window",
        "stall_seconds": window.stall_seconds,
        "drag_seconds": window.drag_seconds(),
        "first_drag_seconds": window.drag_seconds(FIRST),
        "commit_seconds": window.commit_seconds(),
        "worst_seconds": window.worst_seconds(),
        "iteration_seconds": window.baseline_seconds,
        "iterations": len(window.iterations),
        "durable_seconds": window.durable_seconds,
    }


def _alone(session: Session, step: int, nbytes: int) -> Events:
    """Measure what a save takes of the interpreter, how fast it comes to the host, and how fast the state comes back,
    beside no training."""
    with contextlib.suppress(OSError), Counter() as counter:  # without Linux nobody knows
        time.sleep(0.5)
        counter.stretch()
        session.save(step).durable.result(_PATIENCE_SECONDS)
        yield {"kind": "interpreter", "lost_seconds": counter.stretch().lost_seconds}
    if isinstance(session, Asyncckpt):
        snapshots = session.checkpointer._starter.snapshots
        began = time.perf_counter()
        saved = session.save(step + 1)
        while not snapshots.is_idle():
            time.sleep(0.0005)
        landed = time.perf_counter() - began
        saved.durable.result(_PATIENCE_SECONDS)
        if session.snapshot == "device":
            yield {"kind": "drain", "bytes_per_second": nbytes / landed}
        drop_page_cache(session.path(step + 1))
        began = time.perf_counter()
        session.restore(step + 1)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield {"kind": "restore", "bytes_per_second": nbytes / (time.perf_counter() - began)}


def many(state: State, directory: str, device: str, contender: str, saves: int, _batch: int = 0) -> Events:
    """Measure how long ``save`` of many small tensors takes to return."""
    session = CONTENDERS[contender](state, directory)
    optimizer = state["optimizer"]
    for parameter in state["model"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(1, _WARM_SAVES + saves + 1):
        began = time.perf_counter()
        saved = session.save(step)
        seconds = time.perf_counter() - began
        optimizer.step()
        saved.durable.result(_PATIENCE_SECONDS)
        if step > _WARM_SAVES:
            yield {"kind": "returns", "return_seconds": seconds, "tensors": len(all_tensors(state))}
    session.close()


def ceilings(state: State, directory: str, device: str, _contender: str, saves: int, _batch: int = 0) -> Events:
    """Measure what the device, its bus and the disk do with nothing in the way."""
    source = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device=device)
    pinned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.startswith("cuda"))
    for _ in range(saves):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(16):
            pinned.copy_(source, non_blocking=True)
        _synchronize(device)
        yield {"kind": "bus", "bytes_per_second": 16 * _CHUNK_BYTES / (time.perf_counter() - began)}
    nbytes = min(_RAW_BYTES, sum(tensor.nbytes for tensor in all_tensors(state)))
    ceiling = Ceiling([torch.ones(nbytes, dtype=torch.uint8, device="cpu")], directory)
    for _ in range(saves):
        yield {
            "kind": "disk",
            "write_bytes_per_second": nbytes / ceiling.write(),
            "read_bytes_per_second": nbytes / ceiling.read(),
        }
    ceiling.close()


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _reserved(device: str) -> int:
    return torch.cuda.memory_reserved(device) if device.startswith("cuda") else 0


SCENARIOS: Final[dict[str, Callable[[State, str, str, str, int, int], Events]]] = {
    "loop": loop,
    "many": many,
    "ceilings": ceilings,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("directory")
    parser.add_argument("--contender", default=NOTHING)
    parser.add_argument("--size", default="large")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    made = many_state(asked.device) if asked.scenario == "many" else gpt_state(asked.size, asked.device)
    folder = tempfile.mkdtemp(prefix="gpu-", dir=asked.directory)
    try:
        measured = SCENARIOS[asked.scenario]
        for event in measured(made, folder, asked.device, asked.contender, asked.saves, asked.batch):
            print(json.dumps(event), file=out, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
