"""``asyncckpt prune`` deletes the checkpoints that no policy keeps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from asyncckpt.catalog import retention
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.common import (
    JsonOption,
    RunArgument,
    as_json,
    checkpoints,
    clean,
    console,
    exits,
    open_run,
    print_json,
    verified,
)
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, InvalidOption
from asyncckpt.report.quantities import size
from asyncckpt.run import Run


def prune(
    run: RunArgument,
    keep_last: Annotated[int | None, typer.Option(help="keep the newest K", metavar="K")] = None,
    keep_every: Annotated[int | None, typer.Option(help="keep steps divisible by N", metavar="N")] = None,
    keep_best: Annotated[
        str | None, typer.Option(help="keep the N with the best METRIC", metavar="METRIC[:N[:min|max]]")
    ] = None,
    keep_for: Annotated[
        float | None, typer.Option(help="keep what was saved in the last H hours before the newest", metavar="H")
    ] = None,
    keep_step: Annotated[list[int] | None, typer.Option(help="keep this step (repeatable)", metavar="S")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
    json: JsonOption = False,
) -> None:
    """Delete the checkpoints that no policy keeps.

    Pinned and damaged checkpoints, those that somebody reads, and the newest always stay. The newest that stays is
    verified first: where it is damaged, nothing is deleted."""
    with exits():
        opened = open_run(run)
        entries = [entry for entry in checkpoints(opened) if entry.damage is None and not entry.renamed]
        policies = _policies(keep_last, keep_every, keep_best, keep_for, keep_step or [], entries)
        to_delete = retention.plan(entries, policies)
        in_use: list[CheckpointInfo] = []
        if to_delete:
            newest = _newest_kept(entries, to_delete)
            if not dry_run:
                planned = to_delete
                to_delete = _delete(opened, policies, newest)
                names = {entry.name for entry in to_delete}
                in_use = [entry for entry in planned if entry.name not in names and os.path.lexists(entry.path)]
        if json:
            lists = {"deleted": to_delete, "in_use": in_use}
            print_json({"dry_run": dry_run} | {key: [as_json(entry) for entry in rows] for key, rows in lists.items()})
            return
        word = "would delete" if dry_run else "deleted"
        for entry in to_delete:
            console.print(f"{word} {clean(entry.path)}  {size(entry.nbytes)}")
        for entry in in_use:
            console.print(f"kept {clean(entry.path)}: it was pinned, or is being read")
        console.print(f"{word} {len(to_delete)} of {len(entries)}, {size(sum(entry.nbytes for entry in to_delete))}")


@dataclass(frozen=True, slots=True)
class _Verified:
    """Keeps the checkpoint that was just verified, whatever another process publishes before this one holds the
    lease."""

    step: int
    kind: str

    def keep(self, candidates: Sequence[retention.Candidate]) -> set[int]:
        return {c.step for c in candidates if (c.step, c.kind) == (self.step, self.kind)}

    def describe(self) -> str:
        return f"Verified({self.step}, {self.kind!r})"


def _newest_kept(entries: list[CheckpointInfo], to_delete: list[CheckpointInfo]) -> CheckpointInfo:
    """Return the newest full checkpoint that stays, or the newest weights-only one in a run that has no full one."""
    names = {entry.name for entry in to_delete}
    kept = [entry for entry in entries if entry.name not in names]
    if not kept:
        raise InvalidOption("these policies keep none of the checkpoints; nothing was deleted. Add --keep-last 1")
    return max(kept, key=lambda entry: (entry.kind == "full", *retention.age(entry)))


def _delete(run: Run, policies: list[retention.Policy], newest: CheckpointInfo) -> list[CheckpointInfo]:
    damage = verified(run, newest)
    if damage is None:
        raise CheckpointNotFound(f"{newest.path} was deleted by another process meanwhile; nothing was deleted here")
    if damage:
        raise CheckpointDamaged(
            f"{newest.path} would be kept and is damaged ({damage[0]}); nothing was deleted. Look at the run with "
            f"`asyncckpt verify --all {run.path}`"
        )
    from asyncckpt.checkpointer import Checkpointer  # torch takes seconds to import

    checkpointer = Checkpointer(run.path, keep=[*policies, _Verified(newest.step, newest.kind)])
    with contextlib.closing(checkpointer):
        return checkpointer.prune()


def _policies(
    last: int | None,
    every: int | None,
    best: str | None,
    hours: float | None,
    steps: list[int],
    entries: list[CheckpointInfo],
) -> list[retention.Policy]:
    policies: list[retention.Policy] = []
    if last is not None:
        policies.append(retention.KeepLast(last))
    if every is not None:
        policies.append(retention.KeepEvery(every))
    if best is not None:
        policies.append(_best(best, entries))
    if hours is not None:
        policies.append(retention.KeepFor(hours))
    if steps:
        policies.append(retention.KeepSteps(steps))
    if not policies:
        raise InvalidOption("give at least one --keep-… policy: without one everything is kept")
    return policies


def _best(text: str, entries: list[CheckpointInfo]) -> retention.KeepBest:
    metric, _, rest = text.partition(":")
    count, _, mode = rest.partition(":")
    if count and not count.isdecimal():
        raise InvalidOption(f"--keep-best {text}: give METRIC:N:min or METRIC:N:max")
    known = sorted({name for entry in entries for name in entry.metrics})
    if entries and metric not in known:  # a typing error in the metric's name would otherwise delete the best ones
        raise InvalidOption(
            f"--keep-best {text}: no checkpoint has the metric; there are: {', '.join(known) or 'none'}"
        )
    if mode not in ("min", "max"):  # whether less is better cannot be known of a name
        raise InvalidOption(f"--keep-best {text}: give {metric}:{count or 1}:min or {metric}:{count or 1}:max")
    return retention.KeepBest(metric, int(count or 1), mode="min" if mode == "min" else "max")
