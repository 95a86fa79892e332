"""The figures are shown as rich tables, and become a result."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import peers
from benchmarks.harness import figures
from benchmarks.harness.environment import sentence
from benchmarks.harness.results import Cells, Result, Table
from benchmarks.harness.runner import Run

_MET = {True: "yes", False: "no", None: "-"}


def bars(runs: Sequence[Run]) -> tuple[Cells, list[Cells]]:
    """Return the header and the rows of the table of bars."""
    head: Cells = ("figure", "bar", "measured: median (min..max)", "met", "ceiling, same processes")
    rows: list[Cells] = [
        (row.figure, row.bar, row.measured, _MET[row.met], row.ceiling) for row in figures.engine_rows(runs)
    ]
    return head, rows


def comparison(runs: Sequence[Run], names: Sequence[str]) -> tuple[Cells, list[Cells]]:
    """Return the header and the rows of the peers' table."""
    head = ("peer", "durable GB/s", "of raw", "stall s", "first save s", "raw GB/s", "restore GB/s", "of raw cold read")
    rows: list[Cells] = []
    for name in names:
        found = figures.chosen(runs, "saves", name)
        durable, ratio = figures.durable_seconds(runs, name), figures.ratio_to_raw(runs, name)
        if not found or durable is None:
            continue
        nbytes = figures.state_bytes(found[0])
        rates = figures.spread(nbytes / event["durable_seconds"] for event in figures.later_saves(found))
        stall = figures.spread(event["stall_seconds"] for event in figures.later_saves(found))
        first = figures.spread(e["durable_seconds"] for run in found for e in run.of("save") if e["number"] == 1)
        raw = figures.raw_throughput(found)
        read = figures.chosen(runs, "restores", name)
        seconds = figures.spread(event["seconds"] for run in read for event in run.of("restore"))
        share = figures.restore_ratio(read)
        rows.append(
            (
                peers.load(name).LABEL,
                _text(rates, 2, 1e-9),
                _text(ratio),
                _text(stall, 4),
                _text(first),
                _text(raw, 2, 1e-9),
                f"{nbytes / seconds.median / 1e9:.2f}" if seconds else "-",
                _text(share),
            )
        )
    return head, rows


def dragging(runs: Sequence[Run], names: Sequence[str]) -> tuple[Cells, list[Cells]]:
    """Return the header and the rows of the drag table."""
    head = ("peer", "drag a save, s", "of that, save() s", "quiet iteration s", "durable while training, s")
    rows: list[Cells] = []
    for name in names:
        events = [event for run in figures.chosen(runs, "drag", name) for event in run.of("drag")]
        if events:
            columns = ("drag_seconds", "stall_seconds", "iteration_seconds", "durable_seconds")
            spreads = [figures.spread(event[column] for event in events) for column in columns]
            rows.append((peers.load(name).LABEL, *(_text(found, 3) for found in spreads)))
    return head, rows


def tables(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, Cells, list[Cells]]]:
    """Return the title, the header and the rows of every table that has something to show."""
    found = [
        ("The engine's bars", *bars(runs)),
        ("Peers, saves after the first", *comparison(runs, names)),
        ("Drag on a training loop (reported, no bar)", *dragging(runs, names)),
    ]
    return [(title, head, rows) for title, head, rows in found if any(row[2] != figures.UNMEASURED for row in rows)]


def show(runs: Sequence[Run], names: Sequence[str], environment: Mapping[str, str | int], console: Console) -> None:
    for title, head, rows in tables(runs, names):
        table = RichTable(title=title, title_justify="left")
        for column in head:
            table.add_column(column, overflow="fold")
        for row in rows:
            style = {"yes": "green", "no": "red"}.get(row[3]) if title == "The engine's bars" else None
            table.add_row(*row, style=style)
        console.print(table)
    console.print(_footer(runs, environment), highlight=False)


def tell(
    result: Result, met: Sequence[bool | None], console: Console, *, out: Path | None = None, as_json: bool = False
) -> None:
    """Print a result of one table, or with ``as_json`` its JSON; ``met`` says of each row whether its bar was met.
    ``out``: a folder for ``<suite>.json`` and ``<suite>.md``."""
    if as_json:
        print(result.json(), end="")
    else:
        (found,) = result.tables
        table = RichTable(title=found.title, title_justify="left")
        for column in found.head:
            table.add_column(column, overflow="fold")
        for row, is_met in zip(found.rows, met, strict=True):
            table.add_row(*row, style={True: "green", False: "red", None: None}[is_met])
        console.print(table)
        console.print(result.footer, highlight=False)
    if out is not None:
        for name, content in ((f"{result.suite}.json", result.json()), (f"{result.suite}.md", result.markdown())):
            Console(stderr=True).print(f"wrote {write(str(out), name, content)}")


def result(
    runs: Sequence[Run],
    names: Sequence[str],
    environment: Mapping[str, str | int],
    options: Mapping[str, object],
    command: str,
) -> Result:
    """Return the tables, and everything that was reported, every single figure included."""
    data = {
        "options": dict(options),
        "bars": [asdict(row) for row in figures.engine_rows(runs)],
        "runs": [{**asdict(run.job), "error": run.error, "events": run.events} for run in runs],
    }
    found = [Table(title, head, rows) for title, head, rows in tables(runs, names)]
    return Result(str(options["suite"]), command, environment, found, _footer(runs, environment), data)


def write(directory: str, name: str, text: str) -> str:
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    with open(path, "w") as file:
        file.write(text)
    return path


def _footer(runs: Sequence[Run], environment: Mapping[str, str | int]) -> str:
    states = [event for run in runs for event in run.of("state") if run.job.scenario != "many"]
    size = ""
    if states:
        nbytes = statistics.median(event["nbytes"] for event in states)
        size = f"{nbytes / 1e9:.2f} GB in {states[0]['tensors']} tensors; "
    failed = sorted({f"{run.job.scenario} of {run.job.peer}" for run in runs if run.error is not None})
    lost = f" Failed: {', '.join(failed)}." if failed else ""
    return f"{size}{sentence(dict(environment))}.{lost}"


def _text(found: figures.Spread | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if found is None else found.text(digits, scale)
