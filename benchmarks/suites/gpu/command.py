"""``python -m benchmarks gpu`` trains beside the saves of each contender, in fresh processes, and prints two tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.harness import environment
from benchmarks.harness.report import write
from benchmarks.harness.results import Result, Table
from benchmarks.suites.gpu import bars
from benchmarks.suites.gpu.contenders import CONTENDERS, NOTHING

TITLE = "Saves beside training on a GPU"
BAR_TITLE = "Bars"
NO_GPU = "the suite gpu measures saves of a state on a GPU, and torch finds no CUDA device here: nothing was measured"
_TIMEOUT_SECONDS = 300.0
_SHOWN_CHARACTERS = 2000
_SAVES = 3
_SAVES_OF_MANY = 20


def run(
    directory: Path, rounds: int, out: Path | None, as_json: bool, console: Console, only: Sequence[str] = ()
) -> Result:
    """Measure, print and return the result; progress goes to stderr. ``only``: the contenders, all when empty; one that
    fails is listed with its error. ``out`` is the folder for ``gpu.json`` and ``gpu.md``. About a minute a contender.
    Without a GPU it says so, and exits with 2."""
    progress = Console(stderr=True)
    if not torch.cuda.is_available():
        progress.print(NO_GPU, soft_wrap=True)
        raise typer.Exit(2)
    events: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    batch = 0
    for number in range(rounds):
        for scenario, contender in jobs(only):
            progress.print(f"round {number + 1}: {scenario}, {contender}")
            found, error = _run_job(scenario, contender, directory, batch)
            events += found
            batch = batch or next((event["batch"] for event in found if event["kind"] == "state"), 0)
            if error:
                errors[contender] = error
                progress.print(f"  failed: {error}", highlight=False)
    described = environment.describe(str(directory))
    described["gpu"] = torch.cuda.get_device_name()
    described["cuda"] = str(torch.version.cuda)
    result = result_of(events, errors, described, rounds)
    if as_json:
        print(result.json(), end="")
    else:
        _show(result, console)
    for name, content in (("gpu.json", result.json()), ("gpu.md", result.markdown())) if out is not None else ():
        progress.print(f"wrote {write(str(out), name, content)}")
    return result


def jobs(only: Sequence[str]) -> list[tuple[str, str]]:
    """Return the scenarios and the contenders of a round, in order. Raises ``typer.BadParameter`` for a name that is
    not known."""
    unknown = set(only) - set(CONTENDERS)
    if unknown:
        raise typer.BadParameter(f"unknown contenders {sorted(unknown)}; known are {', '.join(CONTENDERS)}")
    chosen = [name for name in CONTENDERS if not only or name in only]
    many = [("many", name) for name in ("device", "deferred") if name in chosen]
    return [("ceilings", NOTHING), ("loop", NOTHING), *(("loop", name) for name in chosen), *many]


def result_of(
    events: Sequence[dict[str, Any]], errors: dict[str, str], described: dict[str, str | int], rounds: int
) -> Result:
    """Return the result of what the workers have reported."""
    rows = bars.bars(events)
    met = {True: "yes", False: "no", None: "-"}
    tables = [
        Table(TITLE, bars.HEAD, bars.table(events, errors)),
        Table(BAR_TITLE, bars.BAR_HEAD, [[row.figure, row.bar, row.measured, met[row.met]] for row in rows]),
    ]
    state = next((event for event in events if event["kind"] == "state"), None)
    size = f"{state['nbytes'] / 1e9:.2f} GB in {state['tensors']} tensors, batch {state['batch']}; " if state else ""
    gpu = f"{described.get('gpu', 'no GPU')}, CUDA {described.get('cuda', '-')}"
    footer = f"{size}{gpu}, {environment.sentence(described)}."
    data = {"bars": [asdict(row) for row in rows], "errors": errors, "events": list(events)}
    return Result("gpu", f"python -m benchmarks gpu --rounds {rounds}", described, tables, footer, data)


def _show(result: Result, console: Console) -> None:
    for found in result.tables:
        table = RichTable(title=found.title, title_justify="left")
        for column in found.head:
            table.add_column(column, overflow="fold")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    console.print(result.footer, highlight=False)


def _run_job(scenario: str, contender: str, directory: Path, batch: int) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "benchmarks.suites.gpu.worker", scenario, str(directory)]
    saves = _SAVES_OF_MANY if scenario == "many" else _SAVES
    command += ["--contender", contender, "--saves", str(saves), "--batch", str(batch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        return [], f"took longer than {error.timeout:.0f} s"
    found = [{**json.loads(line), "scenario": scenario, "contender": contender} for line in done.stdout.splitlines()]
    return found, done.stderr.strip()[-_SHOWN_CHARACTERS:] if done.returncode else ""
