"""This is the half of ``python -m benchmarks codecs`` that measures chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from asyncckpt.errors import MissingExtra
from benchmarks.harness import environment
from benchmarks.harness.report import write
from benchmarks.suites.codecs import bars, groups, measure, report
from benchmarks.suites.codecs.whole_saves import Row


def run(
    directory: Path,
    rounds: int,
    out: Path | None,
    as_json: bool,
    extra: Sequence[Row] = (),
    console: Console | None = None,
) -> None:
    """Measure the codecs on the run trained in ``directory``, and print tables or JSON; progress goes to stderr.

    ``out`` is the folder for ``codecs.json``, ``codecs.md`` and ``codecs.png``. ``extra`` are rows measured elsewhere,
    which follow in the table of bars.
    """
    progress = Console(stderr=True)
    results = measure.measure(groups.trained_groups(directory), rounds, progress.print)
    rows = [*bars.rows(results), *extra]
    described = environment.describe(str(directory))
    text = report.as_json(results, rows, described, {"suite": "codecs", "rounds": rounds})
    if as_json:
        typer.echo(text)
    else:
        report.show(results, rows, described, console or Console())
    if out is None:
        return
    command = f"python -m benchmarks codecs --rounds {rounds}"
    for name, content in (
        ("codecs.json", text),
        ("codecs.md", report.markdown(results, rows, described, command)),
    ):
        progress.print(f"wrote {write(str(out), name, content)}")
    try:
        report.plot(results, out / "codecs.png")
    except MissingExtra as error:  # everything but the picture is there
        progress.print(f"[yellow]no picture: {error}[/yellow]", soft_wrap=True)
    else:
        progress.print(f"wrote {out / 'codecs.png'}")
