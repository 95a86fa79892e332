"""``asyncckpt demo`` runs the demo."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.cli.common import JsonOption, exits, print_json


def demo(
    out: Annotated[Path, typer.Option(help="where the demo writes; made by it, and removed by its next run")] = Path(
        "demo-run"
    ),
    steps: Annotated[int, typer.Option(help="training steps", min=12)] = 60,
    json: JsonOption = False,
) -> None:
    """Train a small GPT on real text, kill it in mid-save, resume, and show that nothing was lost."""
    with exits():
        from asyncckpt import demo as story

        if not json:
            raise typer.Exit(story.run(out, steps=steps))
        with contextlib.redirect_stdout(sys.stderr):  # the story is for people, and stdout is for programs
            code = story.run(out, steps=steps)
        print_json({"out": str(out), "steps": steps, "bit_equal": code == 0})
        raise typer.Exit(code)
