"""``python -m benchmarks light`` runs the scenarios in fresh processes, and prints their bars."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import environment
from benchmarks.harness.report import tell
from benchmarks.harness.results import Result, Table
from benchmarks.suites.light import bars

TITLE = "Light on the trainer"
_TIMEOUT_SECONDS = 1800.0
_SHOWN_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Job:
    """One scenario on a state of ``tensors`` tensors with ``items`` float32 values each."""

    scenario: str
    tensors: int
    items: int
    repeats: int


#: The sizes: 450 of 600 tensors with 833,333 values each are 1.5 GB; the many are 1 KiB each.
JOBS = (
    Job("returns", 600, 256, 10),
    Job("returns", 24_000, 256, 10),
    Job("returns", 80_000, 256, 5),
    Job("interpreter", 600, 833_333, 5),
    Job("interpreter", 24_000, 256, 5),
    Job("loops", 600, 833_333, 3),
    Job("restores", 24_000, 256, 5),
    Job("restores", 80_000, 256, 3),
    Job("eager", 600, 833_333, 5),
    Job("durable", 600, 833_333, 5),
    Job("budget", 600, 2_388_889, 3),
    Job("first_step", 24_000, 256, 3),
)
#: Shows in seconds that all scenarios work. Its figures are of no use.
QUICK_JOBS = tuple(Job(job.scenario, 40, 5000, 1) for job in JOBS if job.tensors <= 24_000)


def run(
    directory: Path, rounds: int, out: Path | None, as_json: bool, console: Console, jobs: Sequence[Job] = JOBS
) -> Result:
    """Measure, print and return the result; progress goes to stderr. ``out`` is the folder for ``light.json`` and
    ``light.md``. Raises ``RuntimeError`` where a scenario fails."""
    progress = Console(stderr=True)
    events: list[dict[str, Any]] = []
    for number in range(rounds):
        for job in jobs:
            progress.print(f"round {number + 1}: {job.scenario}, {job.tensors:,} tensors")
            found = _run_job(job, directory)
            events += found
            progress.print(f"  {found[-1] if found else 'nothing'}", highlight=False)
    rows = bars.rows(events)
    described = environment.describe(str(directory))
    data = {"options": {"suite": "light", "rounds": rounds}, "bars": [asdict(row) for row in rows], "events": events}
    asked = f"python -m benchmarks light --rounds {rounds}"
    tables = [Table(TITLE, bars.HEAD, [bars.cells(row) for row in rows])]
    result = Result("light", asked, described, tables, f"{environment.sentence(described)}.", data)
    tell(result, [row.met for row in rows], console, out=out, as_json=as_json)
    return result


def _run_job(job: Job, directory: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.suites.light.worker", job.scenario, str(directory)]
    command += ["--tensors", str(job.tensors), "--items", str(job.items), "--repeats", str(job.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed with {done.returncode}:\n{done.stderr[-_SHOWN_CHARACTERS:]}")
    return [{**json.loads(line), "scenario": job.scenario, "tensors": job.tensors} for line in done.stdout.splitlines()]
