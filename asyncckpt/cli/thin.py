"""``asyncckpt thin`` leaves the weights alone of old checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from asyncckpt.cli.common import JsonOption, RunArgument, clean, console, exits, open_run, print_json
from asyncckpt.cli.progress import reading
from asyncckpt.errors import InvalidOption
from asyncckpt.report.quantities import size

Steps = Annotated[list[int] | None, typer.Argument(metavar="[STEP]…", help="thin these out, not all but the newest")]


def thin(
    run: RunArgument,
    steps: Steps = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="drop the optimizer's state, and all else that is no weight")
    ] = False,
    older_than: Annotated[
        int | None, typer.Option(metavar="N", help="thin out the checkpoints of steps before N")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be thinned out")] = False,
    json: JsonOption = False,
) -> None:
    """Leave the weights alone of old checkpoints: drop optimizer state by linking what stays.

    Each becomes a weights-only checkpoint of the same step, with its metrics, config and assets. The newest, pinned and
    damaged checkpoints, and those that somebody reads, stay whole. The newest is verified first: where it is damaged,
    nothing is done."""
    with exits():
        if not optimizer:
            raise InvalidOption("give --optimizer: it says that optimizer state goes, and cannot be had back")
        open_run(run)
        from asyncckpt.derive.thinning import thin as thinning

        with reading("verify the newest") as progress:
            report = thinning(run, steps or (), older_than=older_than, dry_run=dry_run, progress=progress)
        if json:
            rows = [dataclasses.asdict(one) for one in report.thinned]
            print_json({"dry_run": dry_run, "thinned": rows, "kept": report.kept})
            return
        for one in report.thinned:
            if dry_run:
                console.print(f"would thin out {clean(one.source)}")
            else:
                console.print(f"{clean(one.source)} is {clean(one.name)} now  {size(one.nbytes)}")
        for name, why in report.kept.items():
            console.print(f"kept {clean(name)}: {clean(why)}", soft_wrap=True)
        freed = sum(one.freed_bytes for one in report.thinned)
        word = "would thin out" if dry_run else "thinned out"
        console.print(f"{word} {len(report.thinned)}" + ("" if dry_run else f", {size(freed)} less"))
