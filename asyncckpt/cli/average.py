"""``asyncckpt average`` makes one checkpoint of the weights of several."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from asyncckpt.cli.common import LATEST, JsonOption, RunArgument, clean, console, exits, open_run, print_json
from asyncckpt.cli.progress import reading
from asyncckpt.errors import InvalidOption
from asyncckpt.report.quantities import size

Steps = Annotated[list[str] | None, typer.Argument(metavar="[STEP]…", help="two or more steps or names")]
Weights = Annotated[str | None, typer.Option(metavar="W,W,…", help="one weight for each STEP, such as 1,2,1")]


def average(
    run: RunArgument,
    steps: Steps = None,
    last: Annotated[int | None, typer.Option(metavar="K", help="average the newest K")] = None,
    weights: Weights = None,
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="an exponential moving average, from the oldest on")
    ] = None,
    component: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="average this component, not all modules (repeatable)")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="RUN", help="publish the result in this run")] = None,
    name: Annotated[list[str] | None, typer.Option(metavar="NAME", help="a name for it (repeatable)")] = None,
    json: JsonOption = False,
) -> None:
    """Make one weights-only checkpoint of the weights of several.

    All count the same, or as --weights says, or as an exponential moving average. The result is a checkpoint like any
    other: verified, with what it was made of in its manifest. `resume` never takes it, and retention never deletes it.
    It is written into RUN, which no other process may be writing then, or into the run of --to."""
    with exits():
        given = _numbers(weights)
        open_run(run)
        from asyncckpt.derive.averaging import average as averaging  # torch takes seconds to import

        if LATEST in (steps or ()):
            raise InvalidOption("name the steps to average, or give --last K: 'latest' is one checkpoint")
        with reading("average") as progress:
            done = averaging(
                run,
                [int(step) if step.isdecimal() else step for step in steps or ()],
                last=last,
                weights=given,
                decay=ema,
                components=component or (),
                to=to,
                name=name,
                progress=progress,
            )
        if json:
            print_json(dataclasses.asdict(done))
            return
        shares = ", ".join(f"{step} ({weight:.4g})" for step, weight in done.weights)
        console.print(f"{clean(done.path)}  {size(done.nbytes)}, of steps {shares}")


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise InvalidOption(f"--weights {text}: give numbers with commas between them, such as 1,2,1") from error
