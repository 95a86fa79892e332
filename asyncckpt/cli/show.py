"""``asyncckpt show`` shows one checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.cli.common import (
    LATEST,
    JsonOption,
    RunArgument,
    StepArgument,
    age,
    as_json,
    clean,
    console,
    exits,
    numbers,
    open_run,
    print_json,
    read,
)
from asyncckpt.manifest.records import ComponentRecord, Manifest
from asyncckpt.manifest.spread import OwnComponent
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.report.quantities import size
from asyncckpt.state.rank_names import without_rank

#: Only so many are shown, because a zarr checkpoint has two files a tensor.
_FILES_SHOWN = 40
_TENSORS_FILES_SHOWN = 4


def show(
    run: RunArgument,
    step: StepArgument = LATEST,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    json: JsonOption = False,
) -> None:
    """Show what one checkpoint holds and what it was made with."""
    with exits():
        entry, manifest = read(open_run(run), step, lambda entry, found: (entry, _checked(found, tensors)))
        if json:
            print_json(_as_json(entry, manifest, tensors))
            return
        _print_head(entry, manifest)
        _print_components(manifest)
        if tensors:
            _print_tensors(manifest)


def _checked(checkpoint: OpenCheckpoint, tensors: bool) -> Manifest:
    """Return the manifest of a checkpoint whose small files are good, for when it is closed. ``tensors``: with all that
    its parts say of components which ranks have of their own."""
    checkpoint.check_small_files()
    manifest = checkpoint.manifest
    if not tensors:
        return manifest
    components = manifest.components.items()
    return replace(
        manifest,
        components={name: one.described() if isinstance(one, OwnComponent) else one for name, one in components},
    )


def _as_json(entry: CheckpointInfo, manifest: Manifest, tensors: bool) -> dict[str, Any]:
    return as_json(entry) | {
        "attempt": manifest.attempt,
        "digest": manifest.digest,
        "manifest_digest": manifest.file_digest,
        "world_size": manifest.world_size,
        "format": manifest.shard_format,
        "codec": manifest.codec,
        "codec_options": dict(manifest.codec_options),
        "environment": dict(manifest.environment),
        "config": manifest.config,
        "assets": list(manifest.assets),
        "derived": dict(manifest.derived),
        "files": {record.name: record.nbytes for record in manifest.files},
        "components": _summaries(manifest, tensors),
    }


def _print_head(entry: CheckpointInfo, manifest: Manifest) -> None:
    pinned = ", pinned" if entry.pinned else ""
    about = f"step {manifest.step}, {manifest.kind}, {size(manifest.nbytes)}, {age(manifest.created_unix_seconds)}"
    console.print(Text.assemble((clean(entry.path), "bold"), f"  {about}{pinned}, digests {manifest.digest}"))
    console.print(f"manifest {manifest.file_digest}")
    codec = "" if manifest.codec == "none" else f", codec {clean(manifest.codec)}"
    tensors = sum(one["nbytes"] for one in _summaries(manifest, False).values())
    bases = {name for record in manifest.files for name in record.bases}
    layers = f", {len(bases)} files of earlier checkpoints below it" if bases else ""
    console.print(
        f"{clean(manifest.shard_format)}{codec}: {size(tensors)} of tensors in "
        f"{size(sum(record.nbytes for record in manifest.files if record.name not in bases))}{layers}"
    )
    if manifest.names:
        console.print(f"names: {clean(', '.join(manifest.names))}")
    if manifest.assets:
        console.print(f"assets: {clean(', '.join(manifest.assets))}")
    if manifest.derived:
        sources: Any = manifest.derived["from"]
        rows = ", ".join(
            f"step {row['step']} ({row['weight']:.4g})"
            if isinstance(row.get("weight"), float)
            else f"step {row['step']}"
            for row in sources
        )
        console.print(f"made by {clean(manifest.derived['by'])} of: {rows}")
    if manifest.metrics:
        console.print(f"metrics: {numbers(manifest.metrics)}")
    if entry.annotated:
        console.print(f"annotated later: {numbers(entry.annotated)}")
    if entry.annotation_problem is not None:
        console.print(f"annotations that cannot be read: {clean(entry.annotation_problem)}")
    made_with = ", ".join(f"{key} {value}" for key, value in manifest.environment.items() if value is not None)
    console.print(f"made with: {clean(made_with)}")
    if manifest.config is not None:
        console.print(f"config: {clean(manifest.config)}")


def _print_components(manifest: Manifest) -> None:
    table = Table("component", "kind", "tensors", "bytes", "dtypes")
    own: dict[str, list[int]] = {}
    for name, summary in _summaries(manifest, False).items():
        component = manifest.components[name]
        if isinstance(component, OwnComponent):
            own.setdefault(without_rank(name), []).append(summary["nbytes"])
            continue
        dtypes = " ".join(f"{dtype}:{count}" for dtype, count in summary["dtypes"].items())
        table.add_row(name, clean(component.kind), str(summary["tensors"]), size(summary["nbytes"]), dtypes)
    for name, found in own.items():
        table.add_row(name, f"own of {len(found)} ranks", "", size(sum(found)), "")
    console.print(table)
    files = Table("file", "bytes")
    for record in manifest.files[:_FILES_SHOWN]:
        files.add_row(record.name, size(record.nbytes))
    if len(manifest.files) > _FILES_SHOWN:
        files.add_row(f"and {len(manifest.files) - _FILES_SHOWN} more (--json lists them)", "")
    console.print(files)


def _print_tensors(manifest: Manifest) -> None:
    listing = Table("tensor", "dtype", "shape", "file")
    for name, component in manifest.components.items():
        for tensor, record in component.tensors.items():
            files = ", ".join(record.files[:_TENSORS_FILES_SHOWN])
            more = len(record.files) - _TENSORS_FILES_SHOWN
            shown = files if more <= 0 else f"{files} and {more} more"
            listing.add_row(f"{name}.{clean(tensor)}", record.dtype, str(list(record.shape)), shown)
        for alias, target in component.aliases.items():
            listing.add_row(f"{name}.{clean(alias)}", "", f"= {clean(target)}", "")
    console.print(listing)


def _summaries(manifest: Manifest, every: bool) -> dict[str, dict[str, Any]]:
    """Describe the components by name. ``every``: list their tensors, too. What a rank has of its own is described by
    its files, unless that was read: there may be thousands."""
    sizes = {record.name: record.nbytes for record in manifest.files}
    return {
        name: _of_files(component, sizes)
        if isinstance(component, OwnComponent) and component.files
        else _summary(component, every)
        for name, component in manifest.components.items()
    }


def _of_files(component: OwnComponent, sizes: Mapping[str, int]) -> dict[str, Any]:
    nbytes = sum(sizes[file] for file in component.files)
    return {"kind": component.kind, "tensors": None, "nbytes": nbytes, "dtypes": {}, "aliases": {}}


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
            name: {"dtype": record.dtype, "shape": list(record.shape), "files": list(record.files)}
            for name, record in component.tensors.items()
        }
    return summary
