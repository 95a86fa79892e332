"""``asyncckpt verify`` reads every byte of a checkpoint and checks it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.text import Text

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.common import (
    LATEST,
    Exit,
    JsonOption,
    RunArgument,
    StepArgument,
    checkpoints,
    clean,
    console,
    exits,
    find_all,
    open_run,
    print_json,
    verified,
)
from asyncckpt.errors import CheckpointNotFound, InvalidOption
from asyncckpt.manifest.json import check_expected
from asyncckpt.read.damage import Damage
from asyncckpt.read.verify import required_components
from asyncckpt.report.quantities import size

_LOOKS = 20


def verify(
    run: RunArgument,
    step: StepArgument = LATEST,
    every: Annotated[bool, typer.Option("--all", help="verify every checkpoint of the run")] = False,
    expect_digest: Annotated[
        str | None, typer.Option(metavar="SHA256", help="what `show` called the manifest when you trusted it")
    ] = None,
    require: Annotated[
        str | None, typer.Option(metavar="NAMES", help="components that must be there, such as model,optimizer")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Read every byte of a checkpoint and check it. Safe on a directory you do not trust.

    Bytes are read from the disk, past the page cache. The command exits with 1 where anything is damaged, and where
    a component of --require is not in a checkpoint. Files that the manifest does not list are named, and are neither
    read nor damage."""
    with exits():
        opened = open_run(run)
        if every and expect_digest is not None:
            raise InvalidOption("give a step with --expect-digest: it is the digest of one checkpoint")
        check_expected(expect_digest)
        required = required_components([name.strip() for name in require.split(",")] if require is not None else ())
        found: list[tuple[CheckpointInfo, list[Damage]]] = []
        # a live run may delete all of them while they are read: then look again at what is there
        for _ in range(_LOOKS):
            entries = checkpoints(opened) if every else find_all(opened, step)
            checked = [(entry, verified(opened, entry, expect_digest, required)) for entry in entries]
            found = [(entry, damage) for entry, damage in checked if damage is not None]
            if found or not entries:
                break
        if not found:
            raise CheckpointNotFound(f"{run}: no checkpoint here")
        if json:
            print_json(
                [
                    {
                        "step": entry.step,
                        "name": entry.name,
                        "damage": [dataclasses.asdict(one) for one in damage],
                        "extra": list(entry.extra),
                    }
                    for entry, damage in found
                ]
            )
        else:
            for entry, damage in found:
                if not damage:
                    console.print(Text.assemble(("good", "green"), f"     {clean(entry.path)}  {size(entry.nbytes)}"))
                for name in entry.extra:
                    where = f"     {clean(entry.path)}/{clean(name)}: not of this checkpoint, and not read"
                    console.print(Text.assemble(("note", "cyan"), where), soft_wrap=True)
                for one in damage:
                    line = Text.assemble(("damaged", "red"), f"  {clean(entry.path)}/{clean(one)}")
                    console.print(line, soft_wrap=True)
        if any(damage for _, damage in found):
            raise typer.Exit(int(Exit.DAMAGED_OR_DIFFERENT))
