"""Scenarios run here in fresh processes, one at a time, peers by turns; what they report is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: An event is one figure: its ``kind`` and numbers, in seconds and bytes, as their names say.
Event: TypeAlias = dict[str, Any]

#: A worker that hangs is killed: one bad peer must not end the whole run.
JOB_TIMEOUT_SECONDS = 900.0
_ERROR_LINES = 12


@dataclass(frozen=True, slots=True)
class Job:
    scenario: str
    peer: str
    round: int
    repeats: int


@dataclass(slots=True)
class Run:
    """Holds a finished job: its events in order, and its error where it failed."""

    job: Job
    events: list[Event] = field(default_factory=list)
    error: str | None = None

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]


def plan(suite: str, peers: Sequence[str], rounds: int) -> list[Job]:
    """Return the jobs of a suite, peers by turns: a machine that slows down slows all of them."""
    ours = [peer for peer in peers if peer.startswith("asyncckpt")]
    jobs: list[Job] = []
    if suite in ("engine", "peers"):
        jobs += [Job("saves", peer, number, 5) for number in range(1, rounds + 1) for peer in peers]
    if suite == "engine":
        if "asyncckpt_deferred" in ours:
            jobs.append(Job("returns", "asyncckpt_deferred", 1, 25))
        if "asyncckpt" in ours:
            jobs += [Job("many", "asyncckpt", number, 3) for number in range(1, rounds + 1)]
            jobs.append(Job("budget", "asyncckpt", 1, 3))
    if suite in ("engine", "restore"):
        once = [peer for peer in peers if peer != "asyncckpt_deferred" and not peer.startswith("dcp_async")]
        jobs += [Job("restores", peer, number, 3) for number in range(1, rounds + 1) for peer in once]
    if suite in ("engine", "drag"):
        chosen = [p for p in peers if p in ("asyncckpt_deferred", "torch_checkpointing") or p.startswith("dcp_async")]
        jobs += [Job("drag", peer, 1, 5) for peer in chosen]
    return jobs


def run(jobs: Sequence[Job], size: str, directory: str, console: Console) -> list[Run]:
    """Run all jobs. A failed one is reported with its error, and the rest goes on. Blocks."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    runs: list[Run] = []
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("all jobs", total=len(jobs))
        for job in jobs:
            task = progress.add_task(f"{job.scenario} {job.peer} round {job.round}: starting", total=job.repeats)

            def show(event: Event, job: Job = job, task: object = task) -> None:
                text = f"{job.scenario} {job.peer} round {job.round}: {_brief(event)}"
                done = event["kind"] in ("save", "restore", "drag") and event.get("state") != "few"
                progress.update(task, description=text, advance=int(done))  # type: ignore[arg-type]

            finished = run_one(job, size, directory, show)
            runs.append(finished)
            progress.remove_task(task)
            progress.advance(overall)
            console.print(_line(finished), highlight=False)
    return runs


def run_one(job: Job, size: str, directory: str, show: Callable[[Event], None]) -> Run:
    """Run one job in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.suites.worker", job.scenario, job.peer, directory]
    command += ["--size", size, "--repeats", str(job.repeats)]
    finished = Run(job)
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        watchdog = threading.Timer(JOB_TIMEOUT_SECONDS, process.kill)
        watchdog.start()
        try:
            for line in process.stdout or ():
                event = json.loads(line)
                finished.events.append(event)
                show(event)
            code = process.wait()
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()
        if code != 0:
            stderr.seek(0)
            finished.error = _why(stderr, code)
    return finished


def _why(stderr: Iterable[str], code: int) -> str:
    lines = [line.rstrip() for line in stderr if line.strip()]
    missing = next((line for line in lines if line.startswith("ModuleNotFoundError")), None)
    return missing or f"exit status {code}\n" + "\n".join(lines[-_ERROR_LINES:])


def _brief(event: Event) -> str:
    numbers = [
        f"{name.removesuffix('_seconds')} {value:.3f} s"
        for name, value in event.items()
        if isinstance(value, float) and name.endswith("seconds")
    ]
    if event["kind"] == "memory":
        numbers = [f"{event['above_state_bytes'] / (1 << 20):.0f} MiB above the state"]
    return f"{event['kind']} {', '.join(numbers)}"


def _line(finished: Run) -> str:
    job = finished.job
    head = f"{job.scenario:9} {job.peer:20} round {job.round}"
    if finished.error is not None:
        return f"[red]{head}  failed: {finished.error}[/red]"
    brief = [_brief(event) for event in finished.events if event["kind"] in ("save", "restore", "drag", "memory")]
    return f"{head}  {brief[-1] if brief else ''}"
