"""``python -m asyncckpt.demo.train`` is a training process of the demo: an ordinary loop around ``Checkpointer.step``.

It reports on standard output, a JSON object a line, so that the process that started it can look on and kill it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from asyncckpt import Checkpointer, KeepBest, KeepLast, Milestones, Steps
from asyncckpt.demo.training import Training, count_alike
from asyncckpt.events import Event
from asyncckpt.integrations.chrome_trace import ChromeTrace


class Reporter:
    """Writes each report as one whole line: a reader never sees half of one, however the process ends. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        self.report(type(event).__name__, **fields)

    def report(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, **fields}, default=str) + "\n"
        with self._lock:
            os.write(1, line.encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, help="steps between saves; without it only the end is saved")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()

    reporter = Reporter()
    reporter.report("Began", at_seconds=time.perf_counter())
    count_alike()
    training = Training(options.corpus, seed=options.seed, total_steps=options.steps)
    trace = ChromeTrace(options.trace) if options.trace else None
    end = Milestones([options.steps])
    checkpointer = Checkpointer(
        options.run,
        every=[Steps(options.every), end] if options.every else end,
        keep=[KeepLast(2), KeepBest("loss", mode="min")],
        on_event=[reporter, trace] if trace else reporter,
        config={"demo": True, "steps": options.steps},
    )
    checkpointer.watch(training.optimizer)
    with checkpointer:
        start = checkpointer.resume(training.state)
        reporter.report("Ready", start=start, at_seconds=time.perf_counter())
        for number in range(start + 1, options.steps + 1):
            loss, marks = training.step()
            checkpointer.step(number, training.state, metrics={"loss": loss})
            reporter.report("Step", step=number, loss=loss, marks=marks)
            if trace:
                for name, began, ended in zip(("forward", "backward", "update"), marks, marks[1:], strict=False):
                    trace.add_span(name, began, ended, step=number)
    if trace:
        trace.close()
    reporter.report("Ended", at_seconds=time.perf_counter())


if __name__ == "__main__":
    main()
