"""``asyncckpt annotate`` gives a checkpoint metrics that were found after it was saved."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncckpt.cli.common import (
    STEP_HELP,
    JsonOption,
    RunArgument,
    as_json,
    clean,
    console,
    exits,
    find,
    name_or_step,
    numbers,
    open_run,
    print_json,
)
from asyncckpt.errors import InvalidOption

Step = Annotated[str, typer.Argument(metavar="STEP", help=STEP_HELP)]
Metrics = Annotated[list[str], typer.Argument(metavar="NAME=NUMBER…", help="such as val_loss=0.3", show_default=False)]


def annotate(run: RunArgument, step: Step, metrics: Metrics, json: JsonOption = False) -> None:
    """Give a checkpoint metrics that were found after it was saved.

    They are kept beside the checkpoint, whose files do not change, and count like those that it was saved with: for
    `ls`, and for what `KeepBest` keeps when the run saves next. Works on a run that another process is writing."""
    with exits():
        given = _parsed(metrics)
        opened = open_run(run)
        found = find(opened, step)
        entry = opened.annotate(name_or_step(found, step), given)
        if json:
            print_json(as_json(entry))
        else:
            console.print(f"{clean(entry.path)}  {numbers(entry.metrics)}")


def _parsed(metrics: list[str]) -> dict[str, float]:
    given: dict[str, float] = {}
    for text in metrics:
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise InvalidOption(f"{text!r} is no metric: give NAME=NUMBER, such as val_loss=0.3")
        if name in given:
            raise InvalidOption(f"{name!r} is given twice")
        given[name] = number
    return given
