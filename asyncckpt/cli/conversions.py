"""What ``import`` and ``export`` have in common: options that choose tensors, and a progress bar with the time left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from asyncckpt.cli.common import errors

if TYPE_CHECKING:
    from asyncckpt.convert.selection import Selection
    from asyncckpt.convert.source import Progress as Report

IncludeOption = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="only tensors of these names (*, ?, [...]); may be repeated"),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="no tensors of these names; may be repeated")
]
RenameOption = Annotated[
    list[str] | None,
    typer.Option("--rename", metavar="OLD=NEW", help="rename tensors: a whole name, or how names begin up to a dot"),
]
DropOption = Annotated[
    list[str] | None,
    typer.Option("--drop", metavar="PATTERN", help="leave behind what the other format cannot hold"),
]

#: The bar is drawn at most so often.
_REDRAW_SECONDS = 0.1


def selection_of(
    include: list[str] | None, exclude: list[str] | None, rename: list[str] | None, drop: list[str] | None
) -> Selection:
    """Return what the options choose. Raises ``InvalidOption``."""
    from asyncckpt.convert.selection import Selection, parse_renames

    return Selection(include=include or (), exclude=exclude or (), drop=drop or (), rename=parse_renames(rename or ()))


@contextlib.contextmanager
def reporting() -> Iterator[Report]:
    """Show a bar on stderr with what is done, how fast, and the time left; it is gone afterwards."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    tasks: dict[str, TaskID] = {}
    drawn: dict[str, float] = {}
    lock = threading.Lock()

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        with lock:
            if what not in tasks:
                progress.start()  # only now: an error before it is one line
                tasks[what] = progress.add_task(what, total=total or None)
            elif done < total and now - drawn[what] < _REDRAW_SECONDS:
                return
            drawn[what] = now
        progress.update(tasks[what], completed=done, total=total or None)

    try:
        yield report
    finally:
        progress.stop()
