"""``python -m benchmarks ranks`` measures jobs of several world sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import environment
from benchmarks.harness.report import tell
from benchmarks.harness.results import Result, Table
from benchmarks.suites.ranks import bars
from benchmarks.suites.ranks.simulation import simulate

TITLE = "Many ranks"
SIZES = (1, 2, 4)
RESTORES = ((4, 2), (2, 4))
SAVES_A_ROUND = 3
_TIMEOUT_SECONDS = 900.0
_SIMULATED = (10_000, 1024, 700)
_SHOWN_LINES = 60  # this many lines, as torchrun's own summary comes last


@dataclass(frozen=True, slots=True)
class Job:
    """Starts ``ranks`` processes in ``mode``; ``before`` says how many ranks wrote what these restore."""

    mode: str
    ranks: int
    before: int = 0


def plan(rounds: int) -> list[Job]:
    """Return the jobs, world sizes by turns: a machine that slows down slows all of them."""
    jobs: list[Job] = []
    for _ in range(rounds):
        jobs += [Job("saves", ranks) for ranks in SIZES]
        jobs += [Job("restores", after, before) for before, after in RESTORES]
    return [*jobs, Job("replicated", 4)]


def run(directory: Path, rounds: int, size: str, out: Path | None, as_json: bool, console: Console) -> Result:
    """Measure, print and return the result; progress goes to stderr. ``out`` is the folder for ``ranks.json`` and
    ``ranks.md``."""
    progress = Console(stderr=True)
    events: list[dict[str, Any]] = []
    for job in plan(rounds):
        progress.print(f"{job.mode} on {job.ranks}" + (f" of what {job.before} wrote" if job.before else ""))
        found = run_job(job, directory, size)
        events += found
        progress.print(f"  {found[-1]}", highlight=False)
    simulated = simulate(*_SIMULATED)
    rows = bars.rows(events, simulated)
    described = environment.describe(str(directory))
    data = {
        "options": {"suite": "ranks", "rounds": rounds, "size": size},
        "bars": [asdict(row) for row in rows],
        "planning": asdict(simulated),
        "events": events,
    }
    asked = f"python -m benchmarks ranks --rounds {rounds} --size {size}"
    tables = [Table(TITLE, bars.HEAD, [bars.cells(row) for row in rows])]
    result = Result("ranks", asked, described, tables, f"{environment.sentence(described)}.", data)
    tell(result, [row.met for row in rows], console, out=out, as_json=as_json)
    return result


def run_job(job: Job, directory: Path, size: str) -> list[dict[str, Any]]:
    """Return what a job reports. Blocks. Raises ``RuntimeError`` with the end of its output where it fails."""
    folder = tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=directory)
    try:
        if job.before:
            _launch(Job("written", job.before), folder, size)
        lines = _launch(job, folder, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [{**json.loads(line), "ranks": job.ranks, "before": job.before} for line in lines]


def _launch(job: Job, folder: str, size: str) -> list[str]:
    events = os.path.join(folder, f"{job.mode}.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
    command += ["-m", "benchmarks.suites.ranks.worker", job.mode, folder, events]
    command += ["--size", size, "--repeats", str(SAVES_A_ROUND)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])
        raise RuntimeError(f"{job} failed with {done.returncode}:\n{last}")
    return Path(events).read_text().splitlines()
