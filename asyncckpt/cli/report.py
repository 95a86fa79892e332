"""``asyncckpt report`` writes one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.cli.common import JsonOption, RunArgument, clean, console, exits, open_run, print_json
from asyncckpt.errors import InvalidOption

Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="the page to write")]
Best = Annotated[
    list[str] | None, typer.Option("--best", metavar="METRIC:min|max", help="mark the best of this metric (repeatable)")
]


def report(
    run: RunArgument,
    out: Out = Path("report.html"),
    best: Best = None,
    force: Annotated[bool, typer.Option("--force", help="replace FILE if it is there")] = False,
    json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about a run, from its checkpoints and its journal.

    It shows when checkpoints were saved, stall, durable time, speed and sizes, metrics with what is kept, best, pinned
    and deleted, changes of versions, and what was verified or went wrong. It needs no network. Works on a run that
    another process is writing."""
    with exits():
        modes = dict(map(_parsed, best or ()))
        opened = open_run(run)
        from asyncckpt.report.page import write_report

        facts = write_report(opened, out, modes=modes, overwrite=force)
        counts = {what: facts.count(what) for what in ("save", "failed", "restore", "fallback", "delete", "verify")}
        if json:
            told = {"out": str(out), "checkpoints": len(facts.entries), "journal": counts, "best": dict(facts.best)}
            print_json(told)
            return
        console.print(f"{clean(out)}: {len(facts.entries)} checkpoints, {len(facts.journal)} lines of the journal")


def _parsed(text: str) -> tuple[str, str]:
    metric, colon, mode = text.rpartition(":")
    if not colon or not metric:
        raise InvalidOption(f"--best {text}: give METRIC:min or METRIC:max")
    return metric, mode
