"""The demo prints live bars on a terminal and plain lines elsewhere, so that something moves all the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Advance = Callable[[int, str], None]

#: Without a terminal, lines come at least this far apart.
_LINE_EVERY_SECONDS = 2.0


class Show:
    """Prints headings, facts, progress and tables on standard output."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._began = time.perf_counter()

    def heading(self, text: str) -> None:
        elapsed = time.perf_counter() - self._began
        self.console.print(f"\n[bold cyan]{text}[/]  [dim]({elapsed:.0f} s)[/]")

    def fact(self, text: str, *, good: bool | None = None) -> None:
        mark = {True: "[green]✓[/] ", False: "[red]✗[/] ", None: "  "}[good]
        self.console.print(f"  {mark}{text}")

    def table(self, table: Table) -> None:
        self.console.print(table)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """Yield ``advance(done, note)``, which the caller calls as often as there is news."""
        if not self.console.is_terminal:
            yield self._lines(what, total)
            return
        columns = (
            TextColumn("  "),
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=total, note="starting Python and torch")
            yield lambda done, note: progress.update(task, completed=done, note=note)

    def _lines(self, what: str, total: int) -> Advance:
        self.console.print(f"    {what}: starting Python and torch")
        shown = time.perf_counter()

        def advance(done: int, note: str) -> None:
            nonlocal shown
            if done == total or time.perf_counter() - shown > _LINE_EVERY_SECONDS:
                shown = time.perf_counter()
                self.console.print(f"    {what}: {done}/{total}  {note}", markup=False)

        return advance
