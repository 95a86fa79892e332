"""This checkout against another of this project, by turns: ``python -m benchmarks.suites.checkouts OTHER``.

Each round is a fresh process of each, with the scenarios of its own ``benchmarks``. A ratio is this one's median over
the other's, of the rounds that both finished; ratios of stall and durable seconds always come together.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

#: Scenario, peer, repeats: what the engine's suite measures of this project.
ENGINE: Final = (
    ("saves", "asyncckpt", 5),
    ("saves", "asyncckpt_deferred", 5),
    ("returns", "asyncckpt_deferred", 15),
    ("many", "asyncckpt", 3),
    ("restores", "asyncckpt", 3),
)
#: How many ranks save together; each job's peers are measured, and asyncckpt's figures taken.
RANKS: Final = (2, 4)
_FIGURES: Final = ("stall_seconds", "durable_seconds", "seconds")
_HERE: Final = Path(__file__).resolve().parents[2]
_TIMEOUT_SECONDS: Final = 900.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Seconds of one kind: ``of[0]`` of the other checkout and ``of[1]`` of this one, a median a round."""

    what: str
    of: tuple[list[float], list[float]]

    @property
    def ratio(self) -> float:
        """This checkout's median over the other's."""
        return statistics.median(self.of[1]) / statistics.median(self.of[0])

    @property
    def by_round(self) -> list[float]:
        """The ratio of each round, in order of size."""
        return sorted(new / old for old, new in zip(*self.of, strict=True))


def compare(
    other: Annotated[Path, typer.Argument(help="a checkout of another commit (git worktree add)")],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    size: Annotated[str, typer.Option()] = "gpt2",
    directory: Annotated[Path | None, typer.Option(help="on the file system to measure")] = None,
    only: Annotated[str, typer.Option(help="scenarios, comma-separated; ranks among them")] = "",
    out: Annotated[Path | None, typer.Option(help="file for all figures as JSON, written after each round")] = None,
) -> None:
    """Measure both checkouts by turns and print a table."""
    progress = Console(stderr=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    target = directory or Path(tempfile.gettempdir())
    found: dict[str, Figure] = {}
    for number in range(rounds):
        jobs: list[tuple[Any, ...]] = [*ENGINE, *(("ranks", count) for count in RANKS)]
        for job in jobs:
            if only and job[0] not in only.split(","):
                continue
            progress.print(f"round {number + 1} of {rounds}: {job}", highlight=False)
            pairs = [_measure(checkout, job, size, target) for checkout in _order(other, number)]
            old, new = pairs if number % 2 == 0 else reversed(pairs)
            for what in old.keys() & new.keys():
                figure = found.setdefault(what, Figure(what, ([], [])))
                figure.of[0].append(old[what])
                figure.of[1].append(new[what])
        if out is not None:
            out.write_text(json.dumps({what: figure.of for what, figure in found.items()}))
        _show(found, console, other)


def _order(other: Path, number: int) -> tuple[Path, Path]:
    """Who is first changes from round to round: the first writes on what the second has just freed."""
    return (other, _HERE) if number % 2 == 0 else (_HERE, other)


def _measure(checkout: Path, job: tuple[Any, ...], size: str, directory: Path) -> dict[str, float]:
    """Run one job in one checkout; return the median of each figure by name, without a process's first save."""
    folder = tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=directory)
    try:
        lines = _ranks(checkout, job[1], size, folder) if job[0] == "ranks" else _engine(checkout, job, size, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    name = f"{job[1]} ranks" if job[0] == "ranks" else f"{job[0]} {job[1]}"
    values: dict[str, list[float]] = {}
    for event in map(json.loads, lines):
        if event["kind"] not in ("save", "restore") or event.get("peer", "asyncckpt") != "asyncckpt":
            continue
        if event["kind"] == "save" and event.get("number") == 1:
            continue
        for figure in _FIGURES:
            if figure in event:
                what = " ".join([name, str(event.get("state", "")), figure.removesuffix("_seconds")])
                values.setdefault(what, []).append(float(event[figure]))
    return {what: statistics.median(seconds) for what, seconds in values.items()}


def _engine(checkout: Path, job: tuple[Any, ...], size: str, folder: str) -> list[str]:
    scenario, peer, repeats = job
    command = [sys.executable, "-m", _module(checkout, "worker"), scenario, peer, folder]
    return _run(checkout, [*command, "--size", size, "--repeats", str(repeats)]).splitlines()


def _ranks(checkout: Path, count: int, size: str, folder: str) -> list[str]:
    events = os.path.join(folder, "saves.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", _module(checkout, "ranks.worker"), "saves", folder, events, "--size", size, "--repeats", "3"]
    _run(checkout, command)
    return Path(events).read_text().splitlines()


def _module(checkout: Path, name: str) -> str:
    """Find a worker where that checkout has it: it has moved."""
    found = [f"benchmarks.suites.{name}", f"benchmarks.{name}"]
    return next(one for one in found if (checkout / f"{one.replace('.', '/')}.py").exists())


def _run(checkout: Path, command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(command[2:])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _show(found: dict[str, Figure], console: Console, other: Path) -> None:
    table = Table(title=f"This checkout over {other}", title_justify="left")
    for column in ("figure", "other, s", "this, s", "ratio of medians", "by round"):
        table.add_column(column)
    for what, figure in sorted(found.items()):
        old, new = (statistics.median(seconds) for seconds in figure.of)
        by_round = " ".join(f"{ratio:.2f}" for ratio in figure.by_round)
        table.add_row(what, f"{old:.4f}", f"{new:.4f}", f"{figure.ratio:.3f}", by_round)
    console.print(table)


if __name__ == "__main__":
    typer.run(compare)
