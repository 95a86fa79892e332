"""``asyncckpt copy`` makes verified copies of checkpoints in another directory."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from asyncckpt.cli.common import JsonOption, RunArgument, clean, console, exits, find, open_run, print_json
from asyncckpt.cli.progress import reading
from asyncckpt.report.quantities import size

Target = Annotated[str, typer.Argument(metavar="DEST", help="the run directory to copy to", show_default=False)]
Steps = Annotated[list[str] | None, typer.Argument(metavar="[STEP]…", help="steps or names; all where none is given")]


def copy(run: RunArgument, dest: Target, steps: Steps = None, json: JsonOption = False) -> None:
    """Copy checkpoints to another run directory, every byte verified on the way.

    Each copy has the original's manifest, and appears whole and durable or not at all. Metrics that were annotated go
    along, pins do not. What is there already is left as it is, so a copy that was cut off can be started again. Works
    on a run that another process is writing; into DEST nobody else may be writing."""
    with exits():
        opened = open_run(run)
        chosen = [find(opened, step).name for step in steps or ()]
        from asyncckpt.derive.copying import copy as copying

        with reading("copy") as progress:
            done = copying(run, dest, chosen, progress=progress)
        if json:
            print_json([dataclasses.asdict(one) for one in done])
            return
        for one in done:
            console.print(f"{'there already' if one.there else 'copied'}  {clean(one.path)}  {size(one.nbytes)}")
