"""``asyncckpt prune``."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from asyncckpt import retention
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.cli.common import JsonOption, RunArgument, as_json, console, exits, open_run, print_json, size
from asyncckpt.errors import CheckpointDamaged, InvalidOption


def prune(
    run: RunArgument,
    keep_last: Annotated[int | None, typer.Option(help="keep the newest K")] = None,
    keep_every: Annotated[int | None, typer.Option(help="keep steps divisible by N")] = None,
    keep_best: Annotated[str | None, typer.Option(help="METRIC, METRIC:N or METRIC:N:max")] = None,
    keep_step: Annotated[list[int] | None, typer.Option(help="keep this step (repeatable)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
    json: JsonOption = False,
) -> None:
    """Delete checkpoints that no policy keeps. Pinned and damaged ones, those being read and the newest stay. The
    newest that stays is verified first: where it is damaged, nothing is deleted."""
    with exits():
        policies = _policies(keep_last, keep_every, keep_best, keep_step or [])
        opened = open_run(run)
        entries = [entry for entry in opened.ls() if entry.damage is None]
        doomed = retention.plan(entries, policies)
        if doomed and not dry_run:
            names = {entry.name for entry in doomed}
            newest = [entry for entry in entries if entry.name not in names][-1]
            damage = opened.verify_entry(newest)
            if damage:
                raise CheckpointDamaged(
                    f"{newest.path} would be kept and is damaged ({damage[0]}); nothing was deleted. Look at the run "
                    f"with `asyncckpt verify --all {run}`"
                )
            checkpointer = Checkpointer(run, keep=policies)
            with contextlib.closing(checkpointer):
                doomed = checkpointer.prune()
        if json:
            print_json({"dry_run": dry_run, "deleted": [as_json(entry) for entry in doomed]})
            return
        word = "would delete" if dry_run else "deleted"
        for entry in doomed:
            console.print(f"{word} {entry.path}  {size(entry.nbytes)}", highlight=False)
        console.print(f"{word} {len(doomed)} of {len(entries)}, {size(sum(entry.nbytes for entry in doomed))}")


def _policies(last: int | None, every: int | None, best: str | None, steps: list[int]) -> list[retention.Policy]:
    policies: list[retention.Policy] = []
    if last is not None:
        policies.append(retention.KeepLast(last))
    if every is not None:
        policies.append(retention.KeepEvery(every))
    if best is not None:
        metric, _, rest = best.partition(":")
        count, _, mode = rest.partition(":")
        if count and not count.isdecimal():
            raise InvalidOption(f"--keep-best {best}: give METRIC, METRIC:N or METRIC:N:max")
        policies.append(retention.KeepBest(metric, int(count or 1), mode or "min"))  # type: ignore[arg-type]
    if steps:
        policies.append(retention.KeepSteps(steps))
    if not policies:
        raise InvalidOption("give at least one --keep-… policy: without one everything is kept")
    return policies
