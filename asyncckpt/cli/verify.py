"""``asyncckpt verify``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from asyncckpt.catalog import CheckpointInfo
from asyncckpt.cli.common import (
    Exit,
    JsonOption,
    RunArgument,
    StepArgument,
    console,
    errors,
    exits,
    find,
    open_run,
    print_json,
    size,
)
from asyncckpt.errors import CheckpointNotFound
from asyncckpt.reading import Damage
from asyncckpt.run import Run


def verify(
    run: RunArgument,
    step: StepArgument = "latest",
    every: Annotated[bool, typer.Option("--all", help="verify every checkpoint of the run")] = False,
    json: JsonOption = False,
) -> None:
    """Read every byte of a checkpoint past the page cache and check it. Safe on a directory you do not trust."""
    with exits():
        opened = open_run(run)
        entries = opened.ls() if every else [_named(opened, step)]
        if not entries:
            raise CheckpointNotFound(f"{run}: no checkpoint here")
        found = {entry.name: damage for entry in entries if (damage := _verify(opened, entry)) is not None}
        if json:
            print_json([{"name": name, "damage": list(map(dataclasses.asdict, d))} for name, d in found.items()])
        else:
            for entry in entries:
                if entry.name in found and not found[entry.name]:
                    console.print(f"[green]good[/green]  {entry.path}  {size(entry.nbytes)}")
                for one in found.get(entry.name, []):
                    console.print(f"[red]damaged[/red]  {entry.path}/{one}", soft_wrap=True, highlight=False)
        if any(found.values()):
            raise typer.Exit(int(Exit.DAMAGED_OR_DIFFERENT))


def _named(run: Run, step: str) -> CheckpointInfo:
    """``latest`` means the newest there is, damaged or not: that is the question asked."""
    entries = run.ls()
    return entries[-1] if step == "latest" and entries else find(run, step)


def _verify(run: Run, entry: CheckpointInfo) -> list[Damage] | None:
    """None where retention took the checkpoint while we looked."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(entry.name, total=entry.nbytes or None)
        try:
            return run.verify_entry(
                entry, progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
        except CheckpointNotFound:
            return None
