"""``asyncckpt convert`` brings in checkpoints of plain ``torch.distributed.checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.cli.common import JsonOption, RunArgument, clean, console, errors, exits, print_json, size


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a directory that dcp.save wrote")],
    run: RunArgument,
    step: Annotated[int, typer.Argument(metavar="STEP", help="the training step that SOURCE holds")],
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="leave out values that only a pickle can hold")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace the step if it is there")] = False,
    json: JsonOption = False,
) -> None:
    """Bring a checkpoint of plain torch.distributed.checkpoint into a run. No pickle is executed."""
    with exits():
        from asyncckpt.convert.dcp import convert as converting  # torch.distributed takes a second to import

        done = converting(source, run, step, skip_unsupported=skip_unsupported, overwrite=force)
        if json:
            print_json(
                {"step": done.step, "path": done.path, "tensors": done.tensors, "nbytes": done.nbytes}
                | {"skipped": dict(done.skipped)}
            )
            return
        console.print(f"step {done.step} → {clean(done.path)}  {done.tensors} tensors, {size(done.nbytes)}")
        for why in done.skipped.values():
            errors.print(f"left out: {clean(why)}", soft_wrap=True)
