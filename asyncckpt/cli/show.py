"""``asyncckpt show``."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from asyncckpt.cli.common import JsonOption, RunArgument, StepArgument, as_json, console, exits, find, open_run
from asyncckpt.cli.common import print_json as write_json
from asyncckpt.cli.common import size as human
from asyncckpt.manifest import ComponentRecord
from asyncckpt.restore import open_manifest


def show(
    run: RunArgument,
    step: StepArgument = "latest",
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    json: JsonOption = False,
) -> None:
    """Show what one checkpoint holds and what it was made with."""
    with exits():
        opened = open_run(run)
        entry = find(opened, step)
        with contextlib.closing(opened.open_entry(entry)) as reader:
            manifest = open_manifest(reader)
        if json:
            write_json(
                as_json(entry)
                | {
                    "attempt": manifest.attempt,
                    "digest": manifest.digest,
                    "world_size": manifest.world_size,
                    "environment": dict(manifest.environment),
                    "config": manifest.config,
                    "files": {record.name: record.nbytes for record in manifest.files},
                    "components": {name: _summary(c, tensors) for name, c in manifest.components.items()},
                }
            )
            return
        console.print(f"[bold]{entry.path}[/bold]  step {manifest.step}, {human(manifest.nbytes)}, {manifest.digest}")
        if manifest.metrics:
            console.print("metrics: " + " ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items()))
        console.print("made with: " + ", ".join(f"{key} {value}" for key, value in manifest.environment.items()))
        if manifest.config is not None:
            console.print("config:", manifest.config)
        table = Table("component", "kind", "tensors", "bytes", "dtypes")
        for name, component in manifest.components.items():
            summary = _summary(component, False)
            dtypes = " ".join(f"{dtype}:{count}" for dtype, count in summary["dtypes"].items())
            table.add_row(name, component.kind, str(summary["tensors"]), human(summary["nbytes"]), dtypes)
        console.print(table)
        if tensors:
            listing = Table("tensor", "dtype", "shape", "file")
            for name, component in manifest.components.items():
                for tensor, record in component.tensors.items():
                    listing.add_row(f"{name}.{tensor}", record.dtype, str(list(record.shape)), record.file)
                for alias, target in component.aliases.items():
                    listing.add_row(f"{name}.{alias}", "", f"= {target}", "")
            console.print(listing)


def _summary(component: ComponentRecord, every: bool) -> dict[str, Any]:
    records = component.tensors.values()
    summary: dict[str, Any] = {
        "kind": component.kind,
        "tensors": len(records),
        "nbytes": sum(record.nbytes for record in records),
        "dtypes": dict(Counter(record.dtype for record in records)),
        "aliases": dict(component.aliases),
    }
    if every:
        summary["list"] = {
            name: {"dtype": record.dtype, "shape": list(record.shape), "file": record.file}
            for name, record in component.tensors.items()
        }
    return summary
