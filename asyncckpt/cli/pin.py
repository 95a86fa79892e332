"""``asyncckpt pin`` and ``asyncckpt unpin`` decide whether retention may delete a checkpoint."""

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
    errors,
    exits,
    find,
    name_or_step,
    open_run,
    print_json,
)

Step = Annotated[str, typer.Argument(metavar="STEP", help=STEP_HELP)]


def pin(run: RunArgument, step: Step, json: JsonOption = False) -> None:
    """Protect a checkpoint from retention, in this run and every later one."""
    _set(run, step, True, json)


def unpin(run: RunArgument, step: Step, json: JsonOption = False) -> None:
    """Let retention delete a checkpoint again."""
    _set(run, step, False, json)


def _set(path: str, step: str, pinned: bool, json: bool) -> None:
    with exits():
        run = open_run(path)
        found = find(run, step)
        which = name_or_step(found, step)
        entry = run.pin(which) if pinned else run.unpin(which)
        if json:
            print_json(as_json(entry))
        else:
            console.print(f"{clean(entry.path)} is {'pinned' if pinned else 'not pinned any more'}")
        if entry.damage is not None:
            errors.print(f"warning: it cannot be used: {clean(entry.damage)}", soft_wrap=True)
