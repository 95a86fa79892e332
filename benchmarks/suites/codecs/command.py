"""This is the half of ``python -m benchmarks codecs`` that measures chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from asyncckpt.errors import MissingExtra
from benchmarks.harness import environment
from benchmarks.harness.report import write
from benchmarks.harness.results import Result
from benchmarks.suites.codecs import bars, groups, measure, report
from benchmarks.suites.codecs.whole_saves import Row


def run(
    directory: Path,
    rounds: int,
    out: Path | None,
    as_json: bool,
    extra: Sequence[Row] = (),
    console: Console | None = None,
) -> Result:
    """Measure the codecs on the run trained in ``directory``, and print and return the result; progress goes to stderr.

    ``out`` is the folder for ``codecs.json``, ``codecs.md`` and ``codecs.png``. ``extra`` are rows measured elsewhere,
    which follow in the table of bars.
    """
    progress = Console(stderr=True)
    results = measure.measure(groups.trained_groups(directory), rounds, progress.print)
    rows = [*bars.rows(results), *extra]
    described = environment.describe(str(directory))
    command = f"python -m benchmarks codecs --rounds {rounds}"
    result = report.result(results, rows, described, {"suite": "codecs", "rounds": rounds}, command)
    if as_json:
        typer.echo(result.json(), nl=False)
    else:
        report.show(results, rows, described, console or Console())
    if out is None:
        return result
    for name, content in (
        ("codecs.json", result.json()),
        ("codecs.md", result.markdown()),
    ):
        progress.print(f"wrote {write(str(out), name, content)}")
    try:
        report.plot(results, out / "codecs.png")
    except MissingExtra as error:  # everything but the picture is there
        progress.print(f"[yellow]no picture: {error}[/yellow]", soft_wrap=True)
    else:
        progress.print(f"wrote {out / 'codecs.png'}")
    return result
