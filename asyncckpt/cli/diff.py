"""``asyncckpt diff``."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from asyncckpt.cli.common import Exit, JsonOption, RunArgument, console, exits, find, open_run, print_json
from asyncckpt.manifest import TensorRecord
from asyncckpt.protocols import JsonValue, Reader
from asyncckpt.restore import load_tensors, open_manifest, read_trees
from asyncckpt.targets import qualified_records


def diff(
    run: RunArgument,
    a: Annotated[str, typer.Argument(metavar="A", help="a step, or 'latest'")],
    b: Annotated[str, typer.Argument(metavar="B", help="a step, or 'latest'")],
    other: Annotated[str | None, typer.Option("--other", metavar="RUN", help="the run B is in, if another")] = None,
    json: JsonOption = False,
) -> None:
    """Compare two checkpoints: names, shapes, and for each tensor the largest absolute change and that change
    relative to A's largest value. Exits with 1 where they differ."""
    with exits():
        run_a, run_b = open_run(run), open_run(other or run)
        with (
            contextlib.closing(run_a.open_entry(find(run_a, a))) as reader_a,
            contextlib.closing(run_b.open_entry(find(run_b, b))) as reader_b,
        ):
            result = compare(reader_a, reader_b)
        if json:
            print_json(result)
        else:
            _print(result)
        if any(result[key] for key in ("only_in_a", "only_in_b", "reshaped", "changed", "plain")):
            raise typer.Exit(int(Exit.DAMAGED_OR_DIFFERENT))


def compare(a: Reader, b: Reader) -> dict[str, Any]:
    """All differences as plain data. One tensor of each is in memory at a time. Raises ``CheckpointDamaged``."""
    in_a, in_b = _stored(a), _stored(b)
    common = [name for name in in_a if name in in_b]
    result: dict[str, Any] = {
        "only_in_a": [name for name in in_a if name not in in_b],
        "only_in_b": [name for name in in_b if name not in in_a],
        "reshaped": {},
        "changed": {},
        "unchanged": 0,
        "plain": _plain_changes(a, b),
    }
    for name in common:
        one, two = in_a[name], in_b[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            result["reshaped"][name] = [f"{one.dtype}{list(one.shape)}", f"{two.dtype}{list(two.shape)}"]
            continue
        change = _change(load_tensors(a, [name])[name], load_tensors(b, [name])[name])
        if change is None:
            result["unchanged"] += 1
        else:
            result["changed"][name] = change
    return result


def _stored(reader: Reader) -> dict[str, TensorRecord]:
    return dict(qualified_records(open_manifest(reader).components))


def _change(a: torch.Tensor, b: torch.Tensor) -> dict[str, float | int | None] | None:
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    first, second = a.to(wide), b.to(wide)
    delta = (first - second).abs()
    finite = delta[torch.isfinite(delta)]
    largest = finite.max().item() if finite.numel() else None
    scale = first.abs()[torch.isfinite(first.abs())]
    base = scale.max().item() if scale.numel() else 0.0
    return {
        "max_abs": largest,
        "relative": largest / base if largest is not None and base else None,
        "not_finite": delta.numel() - finite.numel(),
    }


def _plain_changes(a: Reader, b: Reader) -> list[str]:
    trees_a, trees_b = read_trees(a, open_manifest(a)), read_trees(b, open_manifest(b))
    return sorted(_paths(trees_a, trees_b, ""))


def _paths(a: JsonValue, b: JsonValue, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        found: list[str] = []
        for key in keys:
            where = f"{path}.{key}" if path else key
            found += _paths(a[key], b[key], where) if key in a and key in b else [where]
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [where for i, (x, y) in enumerate(zip(a, b, strict=True)) for where in _paths(x, y, f"{path}.{i}")]
    return [] if a == b and type(a) is type(b) else [path]


def _print(result: dict[str, Any]) -> None:
    for key, sign in (("only_in_a", "-"), ("only_in_b", "+")):
        for name in result[key]:
            console.print(f"{sign} {name}")
    for name, (one, two) in result["reshaped"].items():
        console.print(f"~ {name}: {one} → {two}", highlight=False, markup=False)
    if result["changed"]:
        table = Table("tensor", "max abs change", "relative", "not finite")
        for name, change in result["changed"].items():
            cells = ["" if change[key] is None else f"{change[key]:.3g}" for key in ("max_abs", "relative")]
            table.add_row(name, *cells, str(change["not_finite"] or ""))
        console.print(table)
    for path in result["plain"]:
        console.print(f"≠ {path}", markup=False)
    console.print(f"{len(result['changed'])} tensors changed, {result['unchanged']} equal to the bit")
