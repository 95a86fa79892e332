"""``asyncckpt ls`` lists the checkpoints of a run."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.common import (
    JsonOption,
    RunArgument,
    as_json,
    checkpoints,
    clean,
    console,
    exits,
    first_cells,
    open_run,
    print_json,
)

_DERIVED = {"average": "an average of others", "thin": "thinned out"}


def _good(entry: CheckpointInfo) -> str:
    """Say in what way a checkpoint that is not damaged is good."""
    notes = [
        *([f"named {', '.join(map(clean, entry.names))}"] if entry.names else []),
        *([_DERIVED.get(entry.derived, "made of others")] if entry.derived else []),
        *(["a copy or renamed"] if entry.renamed else []),
        *(["training went back and left it"] if entry.abandoned else []),
        *(["its annotations cannot be read"] if entry.annotation_problem is not None else []),
        *([f"with {len(entry.extra)} files of somebody else's"] if entry.extra else []),
    ]
    return ", ".join(["ok", *notes])


def ls(run: RunArgument, json: JsonOption = False) -> None:
    """List the checkpoints of a run, damaged ones included.

    Rows stand in the order in which checkpoints were saved. What training left when it went back to an earlier step is
    marked. Manifests and sizes are read, data is not: `verify` does that."""
    with exits():
        entries = checkpoints(open_run(run))
        if json:
            print_json([as_json(entry) for entry in entries])
            return
        table = Table("step", "name", "kind", "size", "saved", "metrics", "pin", "state")
        for entry in entries:
            good = entry.damage is None
            table.add_row(
                *first_cells(entry),
                "pinned" if entry.pinned else "",
                Text(_good(entry), "green") if good else Text.assemble(("damaged", "red"), f": {clean(entry.damage)}"),
            )
        console.print(table)
