"""Drag is how much slower training iterations are than without a save, until that save is durable, its stall
included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.peers import Session

_WARMUP = 3
_QUIET = 4
#: The loop's input has this batch and length: about a second an iteration for GPT-2 small on two cores.
_BATCH = 2
_LENGTH = 65


def measure(session: Session, saves: int) -> Iterator[dict[str, float]]:
    """Train; each save comes after ``_QUIET`` quiet iterations, which are its baseline. Yield the figures of each
    save."""
    model, optimizer = session.state["model"], session.state["optimizer"]
    tokens = torch.randint(0, model.size.vocabulary, (_BATCH, _LENGTH))

    def iterate() -> float:
        began = time.perf_counter()
        loss = model(tokens)
        loss.backward()
        with session.guard():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    for _ in range(_WARMUP):
        iterate()
    session.save(1).durable.result()  # what a first save sets up, such as a process, does not count as drag
    quiet = [iterate() for _ in range(_QUIET)]
    for step in range(2, saves + 2):
        began = time.perf_counter()
        saved = session.save(step)
        iterations = 0
        while not saved.durable.done() or not iterations:
            iterate()
            iterations += 1
        elapsed = time.perf_counter() - began
        durable_seconds = saved.durable.result()
        session.forget(step - 1)
        # both neighbours in time are the baseline, so that a machine that gets slower does not count as drag
        after = [iterate() for _ in range(_QUIET)]
        baseline = statistics.median(quiet + after)
        quiet = after
        yield {
            "iteration_seconds": baseline,
            "iterations": iterations,
            "drag_seconds": elapsed - iterations * baseline,
            "stall_seconds": saved.stall_seconds,
            "durable_seconds": durable_seconds,
        }
