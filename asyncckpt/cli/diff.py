"""``asyncckpt diff`` compares two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from asyncckpt.cli.common import (
    STEP_HELP,
    Exit,
    JsonOption,
    RunArgument,
    clean,
    console,
    exits,
    open_run,
    print_json,
    read,
)
from asyncckpt.cli.drift import Moments, by_layer, moments_of
from asyncckpt.manifest.records import StoredTensor
from asyncckpt.read.fill import fill
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.read.scatter import Window
from asyncckpt.types import JsonValue

# importing it takes seconds, and the other verbs do without it
if TYPE_CHECKING:
    import torch

#: Small tensors are read together: each by itself would cost the whole extent that it lies in.
_BATCH_BYTES = 64 << 20
#: This many elements at a time are widened to float64.
_CHUNK = 1 << 20
#: Items of these tags of ``state.json`` are a list; those of the second group are keys and values in turn
#: (docs/format.md).
_SEQUENCES = frozenset({"tuple", "deque", "Size"})
_MAPPINGS = frozenset({"dict", "OrderedDict", "Counter", "defaultdict"})
_DIFFERENCES = ("only_in_a", "only_in_b", "reshaped", "changed", "plain")


def diff(
    run: RunArgument,
    a: Annotated[str, typer.Argument(metavar="A", help=STEP_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help=STEP_HELP)],
    other: Annotated[
        str | None, typer.Option("--other", metavar="RUN", help="the run that B is in, if it is another")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="also drift and cosine of each layer")] = False,
    json: JsonOption = False,
) -> None:
    """Compare two checkpoints, of one run or of two: names, shapes, plain values, and how far each tensor moved.

    For each tensor that is not equal to the bit, the table has max|A-B| and that relative to max|A|, the drift
    |B-A| / |A| (lengths as vectors), and the cosine of the angle between A and B, in float64. The change is 0 where
    only the sign of a zero or the kind of a NaN differs. NaNs and infinities that stand in both at the same place count
    as equal; the others are counted apart. --layers has drift and cosine of the weights of each layer, unchanged ones
    included. The command exits with 1 where the two differ."""
    with exits():
        run_a, run_b = open_run(run), open_run(other or run)
        result = read(run_a, a, lambda _, one: read(run_b, b, lambda _, two: compare(one, two)))
        if json:
            print_json(result)
        else:
            _print(result, layers)
        if any(result[key] for key in _DIFFERENCES):
            raise typer.Exit(int(Exit.DAMAGED_OR_DIFFERENT))


def compare(a: OpenCheckpoint, b: OpenCheckpoint) -> dict[str, Any]:
    """Return all differences as plain data. This takes the memory of the largest tensor twice, or of two batches.
    Raises ``CheckpointDamaged``."""
    from asyncckpt.restore.plan import qualified_records

    a.check_small_files()
    b.check_small_files()
    in_a, in_b = (dict(qualified_records(checkpoint.manifest.components)) for checkpoint in (a, b))
    common = [name for name in in_a if name in in_b]
    reshaped = {
        name: [f"{record.dtype}{list(record.shape)}" for record in (in_a[name], in_b[name])]
        for name in common
        if (in_a[name].dtype, in_a[name].shape) != (in_b[name].dtype, in_b[name].shape)
    }
    changed: dict[str, dict[str, float | int | None]] = {}
    moments: dict[str, Moments] = {}
    for batch in _batches([name for name in common if name not in reshaped], in_a):
        old, new = _load(a, batch, in_a), _load(b, batch, in_b)
        for name in batch:
            one, two = old.pop(name), new.pop(name)
            change, measured = change_of(one, two), moments_of(one, two)
            if measured is not None:
                moments[name] = measured
            if change is not None:
                far = measured or Moments()
                changed[name] = change | {"drift": far.drift, "cosine": far.cosine}
    weights = {name: moments[name] for name in common if name in moments and _is_weight(a, name)}
    return {
        "only_in_a": [name for name in in_a if name not in in_b],
        "only_in_b": [name for name in in_b if name not in in_a],
        "reshaped": reshaped,
        "changed": {name: changed[name] for name in common if name in changed},
        "unchanged": len(common) - len(reshaped) - len(changed),
        "plain": plain_changes(dict(a.trees), dict(b.trees)),
        "layers": by_layer(weights, changed),
    }


def _is_weight(checkpoint: OpenCheckpoint, name: str) -> bool:
    return checkpoint.manifest.components[name.partition(".")[0]].kind in ("module", "tensor", "plain")


def change_of(a: torch.Tensor, b: torch.Tensor) -> dict[str, float | int | None] | None:
    """Measure how far two tensors of one shape and dtype are apart; None where they are equal to the bit.

    ``max_abs`` is max|a-b| over what is finite, None where nothing is. ``relative`` is that over max|a|, None where
    that has no meaning. ``not_finite`` counts the elements whose difference is not a finite number.
    """
    import torch

    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    largest: float | None = None
    scale, not_finite = 0.0, 0
    for begin in range(0, a.numel(), _CHUNK):
        x, y = (tensor.reshape(-1)[begin : begin + _CHUNK].to(wide) for tensor in (a, b))
        same = (x == y) | (x.isnan() & y.isnan())
        delta = torch.where(same, 0.0, (x - y).abs())
        finite = delta.isfinite()
        not_finite += int((~finite).sum())
        comparable = delta[finite & x.isfinite()]
        if comparable.numel():
            largest = max(largest or 0.0, comparable.max().item())
        sizes = x.abs()
        scale = max(scale, torch.where(sizes.isfinite(), sizes, 0.0).max().item())
    if largest is None:
        relative = None
    elif largest == 0:
        relative = 0.0
    else:
        relative = largest / scale if scale else None
    return {"max_abs": largest, "relative": relative, "not_finite": not_finite}


def plain_changes(a: JsonValue, b: JsonValue) -> dict[str, dict[str, JsonValue]]:
    """Map the path of every plain value that differs to ``{"a": …, "b": …}``; a side that lacks it has no entry."""
    return dict(sorted(_paths(a, b, "")))


def _batches(names: list[str], records: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    batch: list[str] = []
    nbytes = 0
    for name in sorted(names, key=lambda name: (records[name].files, getattr(records[name], "begin", 0))):
        if batch and nbytes + records[name].nbytes > _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(name)
        nbytes += records[name].nbytes
    if batch:
        yield batch


def _load(checkpoint: OpenCheckpoint, names: list[str], records: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    import torch

    from asyncckpt.state.dtypes import DTYPES

    tensors = {name: torch.empty(records[name].shape, dtype=DTYPES[records[name].dtype]) for name in names}
    fill(checkpoint, [(records[name], [Window(tensor)]) for name, tensor in tensors.items()])
    return tensors


def _paths(a: JsonValue, b: JsonValue, path: str) -> Iterator[tuple[str, dict[str, JsonValue]]]:
    one, two = _children(a), _children(b)
    if one is not None and two is not None and _tag(a) == _tag(b):
        for key in [*one, *(key for key in two if key not in one)]:
            where = f"{path}.{key}" if path else key
            if key in one and key in two:
                yield from _paths(one[key], two[key], where)
            else:
                yield where, {"a": one[key]} if key in one else {"b": two[key]}
    elif a != b or type(a) is not type(b):
        yield path, {"a": a, "b": b}


def _tag(tree: JsonValue) -> JsonValue:
    return tree.get("$") if isinstance(tree, dict) else type(tree).__name__


def _children(tree: JsonValue) -> dict[str, JsonValue] | None:
    """Return what can be compared item by item, by name or index; None for a leaf."""
    if isinstance(tree, list):
        return {str(index): item for index, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return None
    items = tree.get("v")
    if "$" not in tree:
        return tree
    if tree["$"] in _SEQUENCES and isinstance(items, list):
        return {str(index): item for index, item in enumerate(items)}
    if tree["$"] in _MAPPINGS and isinstance(items, list):
        keys = [key if isinstance(key, str) else repr(key) for key in items[::2]]
        return dict(zip(keys, items[1::2], strict=False)) if len(set(keys)) == len(keys) else None
    return None


def _print(result: dict[str, Any], layers: bool) -> None:
    for key, sign in (("only_in_a", "-"), ("only_in_b", "+")):
        for name in result[key]:
            console.print(f"{sign} {clean(name)}")
    for name, (one, two) in result["reshaped"].items():
        console.print(f"~ {clean(name)}: {one} → {two}")
    if result["changed"]:
        table = Table("tensor", "max abs change", "relative", "drift", "cosine", "not finite")
        for name, change in result["changed"].items():
            table.add_row(
                clean(name), *_cells(change, "max_abs", "relative"), *_far(change), str(change["not_finite"] or "")
            )
        console.print(table)
    if layers:
        table = Table("layer", "drift", "cosine", "tensors", "changed")
        for name, layer in result["layers"].items():
            table.add_row(clean(name), *_far(layer), str(layer["tensors"]), str(layer["changed"]))
        console.print(table)
    for path, sides in result["plain"].items():
        console.print(f"≠ {clean(path)}: {_short(sides, 'a')} → {_short(sides, 'b')}", soft_wrap=True)
    console.print(f"{len(result['changed'])} tensors changed, {result['unchanged']} equal to the bit")


def _cells(row: Mapping[str, float | None], *keys: str) -> list[str]:
    return ["" if (value := row[key]) is None else f"{value:.3g}" for key in keys]


def _far(row: Mapping[str, float | None]) -> list[str]:
    cosine = row["cosine"]
    return [*_cells(row, "drift"), "" if cosine is None else f"{cosine:.6f}"]


def _short(sides: dict[str, JsonValue], side: str) -> str:
    text = clean(repr(sides[side])) if side in sides else "(none)"
    return text if len(text) <= 60 else f"{text[:57]}…"
