"""``asyncckpt follow`` shows a run in the terminal while it is being written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from asyncckpt.catalog.journal import JournalEntry
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.common import RunArgument, age, checkpoints, clean, console, exits, first_cells, open_run
from asyncckpt.errors import InvalidOption, StorageFailed
from asyncckpt.report.quantities import size
from asyncckpt.run import Run

#: The newest checkpoints and the last lines that are shown.
_ROWS = 8
_LINES = 8
_BARS = " ▁▂▃▄▅▆▇█"
_POINTS = 60


def follow(
    run: RunArgument,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", help="look again so often")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show what is there now, and leave")] = False,
) -> None:
    """Show a run in the terminal while it is being written: its newest checkpoints, what saves cost, what happened.

    Looks again every few seconds, until Ctrl-C. Needs no lease and reads no data: manifests and the journal alone."""
    with exits():
        if not 0.1 <= every <= 3600:
            raise InvalidOption(f"--every {every}: give seconds between 0.1 and 3600")
        opened = open_run(run)
        if once:
            console.print(shown(opened))
            return
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            try:
                while True:
                    live.update(_looked(opened), refresh=True)
                    time.sleep(every)
            except KeyboardInterrupt:
                return


def _looked(run: Run) -> RenderableType:
    try:
        return shown(run)
    except StorageFailed as error:  # it may answer again
        return Text(clean(error), "red")


def shown(run: Run) -> RenderableType:
    """Return what the terminal shows of a run now. Blocks on the disk."""
    entries, journal = checkpoints(run), run.journal()
    return Group(_head(run, entries, journal), _checkpoints(entries), _costs(journal), _lines(journal))


def _head(run: Run, entries: Sequence[CheckpointInfo], journal: Sequence[JournalEntry]) -> Text:
    holder = run.holder()
    live = holder is not None and not holder.released
    damaged = sum(entry.damage is not None for entry in entries)
    saved = [entry for entry in entries if entry.created_unix_seconds and not entry.renamed]
    text = Text.assemble((clean(run.path), "bold"), "  ")
    text.append(f"held by {clean(holder)}" if live else "nobody writes it", "green" if live else "yellow")
    text.append(f"\n{len(entries)} checkpoints, {size(sum(entry.nbytes for entry in entries))}")
    if saved:
        text.append(f", the last saved {age(max(entry.created_unix_seconds for entry in saved))}")
    if damaged:
        text.append(f", {damaged} damaged", "red")
    for what, told in (("failed", "failed saves"), ("fallback", "fall-backs")):
        count = sum(entry.what == what for entry in journal)
        if count:
            text.append(f", {count} {told}", "red")
    return text


def _checkpoints(entries: Sequence[CheckpointInfo]) -> Table:
    table = Table("step", "name", "kind", "size", "saved", "metrics", "state")
    for entry in entries[-_ROWS:]:
        state = "pinned" if entry.pinned else "ok"
        table.add_row(
            *first_cells(entry),
            Text(state, "green") if entry.damage is None else Text("damaged", "red"),
        )
    return table


def _costs(journal: Sequence[JournalEntry]) -> Table:
    """Show the last saves as lines of bars, from 0 to the largest, with the last and the largest value."""
    saves = [entry for entry in journal if entry.what == "save"][-_POINTS:]
    table = Table.grid(padding=(0, 2))
    for title, key, scale, unit in (
        ("stall", "stall_seconds", 1e3, "ms"),
        ("durable", "durable_seconds", 1, "s"),
        ("written", "written_bytes", 1e-6, "MB"),
    ):
        values = [value * scale for entry in saves if (value := entry.number(key)) is not None]
        if values:
            table.add_row(title, sparkline(values), f"{values[-1]:.3g} {unit}", f"at most {max(values):.3g} {unit}")
    return table


def sparkline(values: Sequence[float]) -> str:
    """Draw numbers >= 0 as one line of bars; the largest is a whole block."""
    finite = [value if math.isfinite(value) and value > 0 else 0.0 for value in values]
    top = max(finite, default=0.0)
    return "".join(_BARS[math.ceil(value / top * (len(_BARS) - 1))] if top else _BARS[0] for value in finite)


def _lines(journal: Sequence[JournalEntry]) -> Table:
    table = Table.grid(padding=(0, 2))
    for entry in journal[-_LINES:]:
        bad = entry.what in ("failed", "fallback") or bool(entry.number("damage"))
        told = entry.text("reason") or entry.text("first") or entry.text("left")
        if entry.what == "save" and (seconds := entry.number("durable_seconds")) is not None:
            told = f"durable in {seconds:.2f} s"
        style = "red" if bad else "dim"
        cells = (age(entry.at_unix_seconds), entry.what, f"step {entry.step}", clean(entry.name), clean(told)[:100])
        table.add_row(*(Text(cell, style) for cell in cells))
    return table
