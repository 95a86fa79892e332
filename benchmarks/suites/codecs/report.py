"""The measurements are shown as rich tables and as a picture, and become a result."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table as RichTable

from asyncckpt.errors import MissingExtra
from benchmarks.harness.environment import sentence
from benchmarks.harness.results import Cells, Result, Table
from benchmarks.suites.codecs.contenders import PACKAGES
from benchmarks.suites.codecs.groups import NAMES, STAGES
from benchmarks.suites.codecs.measure import GroupResult, Results
from benchmarks.suites.codecs.whole_saves import Row

BARS_TITLE: Final = "Bars; ratios and speeds are those late in training"
_MET: Final = {True: "yes", False: "no", None: "-"}
_GROUP_HEAD: Final[Cells] = ("codec", "ratio", "encode, MB/s a core", "decode, MB/s a core")
_BARS_HEAD: Final[Cells] = ("figure", "bar", "measured: median (min..max)", "met")


def tables(results: Results, bars: Sequence[Row]) -> list[tuple[str, Cells, list[Cells]]]:
    """Return title, header and rows: a table for each group, and the bars."""
    found: list[tuple[str, Cells, list[Cells]]] = []
    for name in NAMES:
        stages = [results.of(name, stage) for stage in STAGES]
        title = f"{name}, {stages[-1].nbytes / 1e6:.1f} MB: {' / '.join(STAGES)} in training"
        found.append((title, _GROUP_HEAD, _group_rows(stages)))
    cells: list[Cells] = [(row.figure, row.bar or "-", row.measured, _MET[row.met]) for row in bars]
    return [*found, (BARS_TITLE, _BARS_HEAD, cells)]


def show(results: Results, bars: Sequence[Row], environment: Mapping[str, str | int], console: Console) -> None:
    for title, head, rows in tables(results, bars):
        table = RichTable(title=title, title_justify="left")
        for column in head:
            table.add_column(column, overflow="fold")
        for row in rows:
            style = {"yes": "green", "no": "red"}.get(row[-1]) if title == BARS_TITLE else None
            table.add_row(*row, style=style)
        console.print(table)
    console.print(_footer(results, environment), highlight=False)


def result(
    results: Results,
    bars: Sequence[Row],
    environment: Mapping[str, str | int],
    options: Mapping[str, object],
    command: str,
) -> Result:
    """Return the tables, and everything that was measured. Rates are bytes of data a second."""
    data = {"options": dict(options), "bars": [asdict(row) for row in bars], **asdict(results)}
    found = [Table(title, head, rows) for title, head, rows in tables(results, bars)]
    described = {**environment, **_versions()}
    return Result("codecs", command, described, found, _footer(results, environment), data)


def plot(results: Results, path: Path) -> None:
    """Draw speed against ratio, in one panel a group, late in training. Raises ``MissingExtra`` without matplotlib."""
    try:
        from benchmarks.suites.codecs import picture
    except ImportError as error:
        raise MissingExtra("the picture needs matplotlib: pip install 'asyncckpt[demo]'") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.draw(results, path)


def _group_rows(stages: Sequence[GroupResult]) -> list[Cells]:
    rows: list[Cells] = []
    for label in (found.label for found in stages[-1].measured):
        found = [stage.of(label) for stage in stages]
        rows.append(
            (
                label,
                " / ".join(f"{one.ratio:.3f}" for one in found),
                " / ".join(f"{one.encode.median / 1e6:.0f}" for one in found),
                " / ".join(f"{one.decode.median / 1e6:.0f}" for one in found),
            )
        )
    return [*rows, ("order-0 bound of the byte planes", " / ".join(f"{stage.bound:.3f}" for stage in stages), "", "")]


def _footer(results: Results, environment: Mapping[str, str | int]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in _versions().items())
    notes = "".join(f" {note}." for note in results.notes)
    return f"Speed of a core: over CPU time. {sentence(dict(environment))}, {versions}.{notes}"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
