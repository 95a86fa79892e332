"""``asyncckpt import`` brings checkpoints of other formats into a run; ``convert`` is its old name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.cli.common import JsonOption, RunArgument, clean, console, errors, exits, print_json
from asyncckpt.cli.conversions import (
    DropOption,
    ExcludeOption,
    IncludeOption,
    RenameOption,
    reporting,
    selection_of,
)
from asyncckpt.report.quantities import size


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a file or directory of another format")],
    run: RunArgument,
    step: Annotated[int, typer.Argument(metavar="STEP", help="the training step that SOURCE holds")],
    format: Annotated[str | None, typer.Option("--format", help="the format of SOURCE; found out by default")] = None,
    component: Annotated[
        str | None, typer.Option("--component", help="call the module that the tensors become so, not 'model'")
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    rename: RenameOption = None,
    drop: DropOption = None,
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="leave out all that cannot be kept, as --drop '*' does")
    ] = False,
    digest: Annotated[
        str, typer.Option("--digest", help="the algorithm of digests; with sha256 that of SOURCE is recorded, too")
    ] = "xxh3-128",
    force: Annotated[bool, typer.Option("--force", help="replace the step if it is there")] = False,
    json: JsonOption = False,
) -> None:
    """Bring a checkpoint of another format into a run.

    SOURCE is a file of safetensors, torch (.pt, .pth, .ckpt, .bin), GGUF or ONNX, a TensorFlow checkpoint, or a
    directory of Transformers, PEFT, torch.distributed.checkpoint, DeepSpeed or zarr.

    What the file became is said. Nothing that a pickle names is executed. What a checkpoint cannot hold is refused by
    name, and left behind with --drop. The manifest records where it came from, with a digest of every file."""
    with exits():
        chosen = selection_of(include, exclude, rename, [*(drop or ()), *(["*"] if skip_unsupported else [])])
        from asyncckpt.convert.formats import import_checkpoint  # torch takes seconds to import

        with reporting() as report:
            done = import_checkpoint(
                source,
                run,
                step,
                format=format,
                component=component,
                selection=chosen,
                overwrite=force,
                digest=digest,
                progress=report,
            )
        if json:
            print_json(
                {"step": done.step, "path": done.path, "tensors": done.tensors, "nbytes": done.nbytes}
                | {"skipped": dict(done.skipped), "components": dict(done.components), "notes": list(done.notes)}
                | {"source": dict(done.source)}
            )
            return
        console.print(f"step {done.step} → {clean(done.path)}  {done.tensors} tensors, {size(done.nbytes)}")
        for note in done.notes:
            console.print(clean(note), soft_wrap=True)
        for name, why in done.skipped.items():
            errors.print(f"left out: {clean(name)} ({clean(why)})", soft_wrap=True)
