"""``asyncckpt best`` finds the checkpoint with the best value of a metric."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from asyncckpt.cli.common import JsonOption, RunArgument, as_json, clean, console, exits, numbers, open_run, print_json
from asyncckpt.errors import InvalidOption

Metric = Annotated[str, typer.Option("--metric", metavar="NAME", help="the metric to rank by")]
Mode = Annotated[str, typer.Option("--mode", metavar="min|max", help="whether less is better, or more")]
Kind = Annotated[str | None, typer.Option("--kind", metavar="full|weights", help="look at checkpoints of this kind")]


def best(
    run: RunArgument, metric: Metric = "loss", mode: Mode = "", kind: Kind = None, json: JsonOption = False
) -> None:
    """Find the checkpoint with the best value of a metric.

    Metrics are those that checkpoints were saved with, and those of `annotate`. Damaged checkpoints and copies are left
    out. The mode must be given, but for a metric whose name ends in "loss": less of that is better."""
    with exits():
        chosen: Any = mode, kind  # Run.best refuses what is none of its words
        if mode not in ("", "min", "max"):
            raise InvalidOption(f"--mode {mode}: give min or max")
        entry = open_run(run).best(metric, chosen[0], kind=chosen[1])
        if json:
            print_json(as_json(entry))
        else:
            console.print(f"{clean(entry.path)}  step {entry.step}, {entry.kind}  {numbers(entry.metrics)}")
