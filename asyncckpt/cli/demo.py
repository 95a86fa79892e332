"""``asyncckpt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.cli.common import exits


def demo(
    out: Annotated[Path, typer.Option(help="where the demo writes; made by it, and removed by its next run")] = Path(
        "demo-run"
    ),
    steps: Annotated[int, typer.Option(help="training steps", min=12)] = 60,
) -> None:
    """Train a small GPT on real text, kill it in mid-save, resume, and show that nothing was lost."""
    with exits():
        from asyncckpt import demo as story

        code = story.run(out, steps=steps)
        raise typer.Exit(code)
