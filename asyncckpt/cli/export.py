"""``asyncckpt export`` writes a checkpoint to one file."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.common import (
    STEP_HELP,
    JsonOption,
    RunArgument,
    clean,
    console,
    exits,
    open_run,
    print_json,
    read,
    size,
)
from asyncckpt.errors import InvalidOption
from asyncckpt.read.opening import OpenCheckpoint


class DType(enum.StrEnum):
    """Lists the floating types to convert to."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


def export(
    run: RunArgument,
    step: Annotated[str, typer.Argument(metavar="STEP", help=STEP_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a name ending in .safetensors or .pt, or a new folder")],
    every: Annotated[bool, typer.Option("--all", help="the whole training state, not only the weights")] = False,
    component: Annotated[str | None, typer.Option(help="this component alone")] = None,
    dtype: Annotated[DType | None, typer.Option(help="convert floating tensors")] = None,
    trainer: Annotated[
        bool, typer.Option("--trainer", help="a folder that the plain Trainer of Transformers resumes from")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="with --trainer: for one with FSDP 2 and full state dicts, its default")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite OUT")] = False,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint to one file: weights for inference, or the whole state. Every byte is verified first."""
    with exits():
        if trainer:
            if every or component is not None or dtype is not None or force:
                raise InvalidOption("--trainer takes the whole state as it is: leave the other options out")
            from asyncckpt.convert.trainer_folder import export_for_trainer

            number, nbytes = read(
                open_run(run), step, lambda entry, one: (entry.step, export_for_trainer(one, out, fsdp=fsdp))
            )
            _tell(number, out, nbytes, "trainer", json)
            return
        if fsdp:
            raise InvalidOption("--fsdp says what --trainer writes: give that, too")
        if every and component is not None:
            raise InvalidOption("give --all or --component, not both")
        what = "all" if every else component or "weights"
        import torch  # importing it takes seconds

        from asyncckpt.convert.single_file import export as exporting

        dtypes = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}
        target = dtypes[dtype] if dtype is not None else None

        def write(entry: CheckpointInfo, checkpoint: OpenCheckpoint) -> tuple[int, int]:
            return entry.step, exporting(checkpoint, out, what=what, dtype=target, overwrite=force)

        number, nbytes = read(open_run(run), step, write)
        _tell(number, out, nbytes, what, json)


def _tell(number: int, out: Path, nbytes: int, what: str, json: bool) -> None:
    if json:
        print_json({"step": number, "out": str(out), "nbytes": nbytes, "what": what})
    else:
        console.print(f"step {number} → {clean(out)}  {size(nbytes)}")
