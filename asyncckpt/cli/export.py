"""``asyncckpt export`` writes a checkpoint in another format."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
)
from asyncckpt.cli.conversions import (
    DropOption,
    ExcludeOption,
    IncludeOption,
    RenameOption,
    reporting,
    selection_of,
)
from asyncckpt.errors import InvalidOption
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.report.quantities import size

if TYPE_CHECKING:
    from asyncckpt.convert.exporting import Exported

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?\Z")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


class DType(enum.StrEnum):
    """Lists the floating types to convert to."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


def export(
    run: RunArgument,
    step: Annotated[str, typer.Argument(metavar="STEP", help=STEP_HELP)],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help="a name that ends in .safetensors, .pt, .pth, .ckpt, .gguf or .onnx, or a new folder"
        ),
    ],
    every: Annotated[bool, typer.Option("--all", help="the whole training state, not only the weights")] = False,
    component: Annotated[str | None, typer.Option(help="this component alone")] = None,
    dtype: Annotated[DType | None, typer.Option(help="convert floating tensors")] = None,
    format: Annotated[str | None, typer.Option("--format", help="the format, where the name does not say it")] = None,
    hf: Annotated[
        bool, typer.Option("--hf", help="a model directory of Transformers, with the checkpoint's assets")
    ] = False,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="begin another file after so much, such as 5GB")
    ] = None,
    quantized: Annotated[
        str | None, typer.Option("--quantized", metavar="KIND", help="the tensors' kind in a .gguf, such as Q8_0")
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    rename: RenameOption = None,
    drop: DropOption = None,
    trainer: Annotated[
        bool, typer.Option("--trainer", help="a folder that the plain Trainer of Transformers resumes from")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="with --trainer: for one with FSDP 2 and full state dicts, its default")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite TARGET")] = False,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint in another format: weights for inference, or the whole state. Every byte is verified first.

    What the format cannot hold is refused by name, and left behind with --drop."""
    with exits():
        if trainer:
            others = (component, dtype, format, shard_size, quantized, include, exclude, rename, drop)
            if every or force or hf or any(one is not None for one in others):
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
        if hf and format is not None:
            raise InvalidOption("give --hf or --format, not both")
        what = "all" if every else component or "weights"
        chosen = selection_of(include, exclude, rename, drop)
        shard_bytes = _bytes(shard_size) if shard_size is not None else None
        from asyncckpt.convert.exporting import FLOATS, ExportOptions  # importing torch takes seconds
        from asyncckpt.convert.formats import export_checkpoint

        if format == "safetensors" and not str(out).endswith(".safetensors"):
            format = "safetensors-shards"
        with reporting() as report:

            def write(entry: CheckpointInfo, checkpoint: OpenCheckpoint) -> tuple[int, Exported]:
                return entry.step, export_checkpoint(
                    checkpoint,
                    out,
                    format="hf" if hf else format,
                    what=what,
                    dtype=FLOATS[dtype.value] if dtype is not None else None,
                    selection=chosen,
                    overwrite=force,
                    progress=report,
                    options=ExportOptions(shard_bytes=shard_bytes, quantized=quantized),
                )

            number, done = read(open_run(run), step, write)
        _tell(number, out, done.nbytes, what, json, done)


def _bytes(text: str) -> int:
    """Return how many bytes ``5GB``, ``200 MB`` or ``1000`` are. Raises ``InvalidOption``."""
    found = _SIZE.match(text.strip())
    if found is None:
        raise InvalidOption(f"--shard-size {text!r}: give a size such as 5GB or 200MB")
    return int(float(found[1]) * _UNITS[found[2]])


def _tell(number: int, out: Path, nbytes: int, what: str, json: bool, done: Exported | None = None) -> None:
    notes = list(done.notes) if done is not None else []
    if json:
        found = {"step": number, "out": str(out), "nbytes": nbytes, "what": what}
        print_json(
            found | ({"format": done.format, "notes": notes, "source": dict(done.source)} if done is not None else {})
        )
        return
    console.print(f"step {number} → {clean(out)}  {size(nbytes)}")
    for note in notes:
        console.print(clean(note), soft_wrap=True)
