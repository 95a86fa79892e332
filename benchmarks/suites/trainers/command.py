"""``python -m benchmarks trainers`` trains in each framework in fresh processes, by turns, and prints one table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import environment
from benchmarks.harness.report import tell
from benchmarks.harness.results import Result, Table
from benchmarks.suites.trainers.worker import FRAMEWORKS, KINDS, state_bytes

TITLE = "In other libraries' trainers"
HEAD = ("", "a save keeps the trainer", "the first two saves", "a step, of one without saves")
_TIMEOUT_SECONDS = 1800.0
_SHOWN_CHARACTERS = 4000
#: The first saves set memory aside, and learn what training changes.
_WARM = 2
#: The layers' width, the steps, and after how many of them one is saved.
FULL = (1500, 65, 8)
#: Shows in seconds that all of it works. Its figures are of no use.
QUICK = (16, 9, 2)


def run(
    directory: Path,
    rounds: int,
    out: Path | None,
    as_json: bool,
    console: Console,
    size: tuple[int, int, int] = FULL,
) -> Result:
    """Measure, print and return the result; progress goes to stderr. ``out`` is the folder for the result's files.
    Raises ``RuntimeError`` where a training fails."""
    progress = Console(stderr=True)
    events: list[dict[str, Any]] = []
    for number in range(rounds):
        for framework in ("raw", *FRAMEWORKS):
            for kind in ("none",) if framework == "raw" else KINDS:
                progress.print(f"round {number + 1}: {framework}, {kind}")
                events.append(_trained(framework, kind, directory, size))
    described = environment.describe(str(directory))
    tables = [Table(TITLE, HEAD, rows(events))]
    mbytes = state_bytes(size[0]) / 1e6
    footer = f"{mbytes:.0f} MB, a save each {size[2]} steps, medians, from the third save on. "
    footer += f"{environment.sentence(described)}."
    data = {"options": {"suite": "trainers", "rounds": rounds, "size": list(size)}, "events": events}
    result = Result("trainers", f"python -m benchmarks trainers --rounds {rounds}", described, tables, footer, data)
    tell(result, [None] * len(tables[0].rows), console, out=out, as_json=as_json)
    return result


def rows(events: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table's rows: the device's, and two for each framework."""
    raw = [event for event in events if event["framework"] == "raw"]
    shown = [["raw copy in memory, one thread", _milliseconds([s for one in raw for s in one["copies"]]), "", ""]]
    shown.append(["raw write with fsync", _milliseconds([s for one in raw for s in one["writes"]]), "", ""])
    for framework in FRAMEWORKS:
        of = {kind: [e for e in events if (e["framework"], e["kind"]) == (framework, kind)] for kind in KINDS}
        alone = statistics.median(s for event in of["none"] for s in event["steps"])
        for kind in KINDS[1:]:
            warm = [s for event in of[kind] for s in event["stalls"][_WARM:]]
            first = [s for event in of[kind] for s in event["stalls"][:_WARM]]
            step = statistics.fmean(s for event in of[kind] for s in event["steps"][1:])
            share = step / statistics.fmean(s for event in of["none"] for s in event["steps"][1:])
            shown.append(
                [
                    f"{framework}, {'its own' if kind == 'plain' else 'asyncckpt'}",
                    _milliseconds(warm),
                    " and ".join(_milliseconds(first[at::_WARM]) for at in range(_WARM)),
                    f"{share:.2f} of {alone * 1e3:.0f} ms",
                ]
            )
    return shown


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms"


def _trained(framework: str, kind: str, directory: Path, size: tuple[int, int, int]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.suites.trainers.worker", framework, kind, str(directory)]
    command += [f"--{name}={value}" for name, value in zip(("width", "steps", "every"), size, strict=True)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False, env=offline)
    if done.returncode:
        raise RuntimeError(f"{framework}, {kind} failed:\n{done.stderr[-_SHOWN_CHARACTERS:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
