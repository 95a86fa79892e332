"""``asyncckpt ls``."""

from __future__ import annotations

from rich.table import Table

from asyncckpt.cli.common import JsonOption, RunArgument, age, as_json, console, exits, open_run, print_json, size


def ls(run: RunArgument, json: JsonOption = False) -> None:
    """List the checkpoints of a run, damaged ones included. Reads manifests and sizes, not data."""
    with exits():
        entries = open_run(run).ls()
        if json:
            print_json([as_json(entry) for entry in entries])
            return
        table = Table("step", "name", "kind", "size", "saved", "metrics", "pin", "state")
        for entry in entries:
            table.add_row(
                str(entry.step),
                entry.name,
                entry.kind,
                size(entry.nbytes),
                age(entry.created_unix_seconds) if entry.created_unix_seconds else "",
                " ".join(f"{name}={value:.6g}" for name, value in entry.metrics.items()),
                "pinned" if entry.pinned else "",
                "[green]ok[/green]" if entry.damage is None else f"[red]damaged[/red]: {entry.damage}",
            )
        console.print(table)
