"""A bar on stderr shows how far a long read or write has come, how fast it is, and how long it will still take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from asyncckpt.cli.common import clean, errors


@contextlib.contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs; it gets a function to call with the bytes done and all of them, from any
    thread."""
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(clean(what), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
