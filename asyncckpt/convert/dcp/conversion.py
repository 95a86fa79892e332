"""``convert`` turns what plain DCP wrote into a checkpoint of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.catalog.names import DEFAULT
from asyncckpt.codecs import digests
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.convert.dcp.native_reader import Foreign, read_foreign
from asyncckpt.convert.selection import Selection, checked_names
from asyncckpt.convert.source import Progress, Source
from asyncckpt.errors import CheckpointDamaged, InvalidOption, UnsupportedValue
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.integrations.dcp.names import Path, place_of
from asyncckpt.integrations.dcp.session import THREADS, WriterSession
from asyncckpt.manifest.records import BoxedRecord, BoxRecord
from asyncckpt.state.dtypes import CODES
from asyncckpt.types import JsonValue, LayoutOptions, LocalTensor, TensorSpec

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, slots=True)
class Converted:
    """Tells what ``convert`` wrote.

    ``path`` is the new checkpoint's directory, ``tensors`` their number, ``nbytes`` their files' size in bytes.
    ``skipped`` maps the FQN of each value that only a pickle can hold to the reason why it was left out. ``source`` is
    what the checkpoint records of the directory: its path, and size and digest of each file.
    """

    path: str
    step: int
    tensors: int
    nbytes: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, JsonValue] = field(default_factory=dict)


def convert(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    step: int,
    *,
    skip_unsupported: bool = False,
    overwrite: bool = False,
    digest: str = "xxh3-128",
    metrics: Mapping[str, float] | None = None,
    selection: Selection | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Converted:
    """Write what plain DCP left in the directory ``source`` into ``run`` as ``step``: tensors bit for bit, as the boxes
    they were saved in, and plain values. The result verifies, restores and exports like any other checkpoint.

    No pickle is executed. Where values are more than plain, ``UnsupportedValue`` names them all; with
    ``skip_unsupported`` they are left out, logged as a warning and listed instead. ``overwrite`` replaces a checkpoint
    of the same step. ``digest`` is the algorithm that proves the new files' bytes, as in ``WriterOptions``.
    ``selection`` chooses and renames entries by their FQNs, and says what else may be left behind. Also raises
    ``CheckpointDamaged`` where the source does not fit together (it has no digests: damage inside tensors cannot be
    seen; or a file changed while it was read), ``CheckpointNotFound``, ``StepExists`` and ``RunLocked``. Blocks until
    the checkpoint is durable; tensors are read as they are written, in extents of 8 MiB. The manifest records where the
    checkpoint came from, with a digest of each file.
    """
    take = digests.get(digest)
    selection = selection or Selection()
    foreign = read_foreign(source)
    opened = Source("dcp", os.fspath(source))
    for file, info in foreign.files.items():
        opened.read_by_others(os.path.join(opened.path, file), info)
    if foreign.skipped and not skip_unsupported:
        selection.check_losses(foreign.skipped, os.fspath(source))
    if foreign.skipped:
        log.warning("%s: left out: %s", os.fspath(source), "; ".join(foreign.skipped.values()))
    foreign = _selected(foreign, selection, os.fspath(source))
    pieces: list[LocalTensor] = []
    boxes: list[tuple[str, tuple[int, ...], TensorSpec]] = []
    for fqn, (_, found) in foreign.tensors.items():
        qualified = ".".join(place_of(fqn, foreign.paths.get(fqn)))
        for box in found:
            tensor = box.tensor
            if tensor.dtype not in CODES:
                raise UnsupportedValue(f"{fqn}: {tensor.dtype} has no code in safetensors")
            shape = tuple(tensor.shape)
            name = BoxRecord(box.offsets, shape, "", 0, 0).entry(qualified)
            spec = TensorSpec(name, CODES[tensor.dtype], shape, tensor.numel() * tensor.element_size())
            boxes.append((fqn, box.offsets, spec))
            pieces.append(LocalTensor(spec, tensor))
    shards = SafetensorsFormat().shards(
        "rank-00000", [piece.spec for piece in pieces], 0, 0, get_codec("none", {}), LayoutOptions()
    )
    at = {placement.spec.name: (shard.file, placement) for shard in shards for placement in shard.placements}
    stored: dict[str, list[BoxRecord]] = {}
    for fqn, offsets, spec in boxes:
        file, placement = at[spec.name]
        stored.setdefault(fqn, []).append(BoxRecord(offsets, spec.shape, file, placement.begin, placement.end))
    records: dict[str, Any] = {}
    for fqn, (shape, found) in foreign.tensors.items():
        if len({box.tensor.dtype for box in found}) != 1:
            raise CheckpointDamaged(f"{os.fspath(source)}: {fqn} is stored in several dtypes, or in none")
        mine = stored[fqn]
        nbytes = sum(box.end - box.begin for box in mine)
        records[fqn] = BoxedRecord(CODES[found[0].tensor.dtype], shape, nbytes, tuple(mine))
    total = sum(shard.nbytes for shard in shards)
    progress("writing", 0, total)
    live, name = WriterSession(), DEFAULT.format(step=step)
    directory = os.path.abspath(os.fspath(run))
    try:
        attempt = live.begin(directory, name, step, overwrite=overwrite)
        with ThreadPoolExecutor(1, "asyncckpt-source") as beside:
            origin = beside.submit(opened.record, digest, progress, foreign.skipped)
            try:
                files = live.write(attempt, shards, pieces, take, THREADS)
            except BaseException:
                opened.give_up()
                raise
        live.publish(
            name,
            step,
            files,
            records,
            foreign.paths,
            foreign.values,
            digest=digest,
            metrics=metrics or {},
            world_size=1,
            overwrite=overwrite,
            imported=origin.result(),
            before=opened.check_unchanged,
        )
    finally:
        live.close()
    progress("writing", total, total)
    return Converted(
        os.path.join(directory, name),
        step,
        len(records),
        sum(shard.nbytes for shard in shards),
        foreign.skipped,
        origin.result(),
    )


def _selected(foreign: Foreign, selection: Selection, where: str) -> Foreign:
    """Return what is chosen of the entries, under their new names. An entry of a list stays where it is: renaming takes
    the names of dicts alone."""
    chosen = {fqn: selection.renamed(fqn) for fqn in (*foreign.tensors, *foreign.values) if selection.takes("", fqn)}
    selection.check_used(where)
    checked_names(chosen.items(), where)
    paths: dict[str, Path] = {}
    for fqn, new in chosen.items():
        path = foreign.paths.get(fqn)
        if path is not None:
            paths[new] = path if fqn == new else _renamed_path(fqn, new, path, where)
    return Foreign(
        {new: foreign.tensors[fqn] for fqn, new in chosen.items() if fqn in foreign.tensors},
        {new: foreign.values[fqn] for fqn, new in chosen.items() if fqn in foreign.values},
        paths,
        foreign.skipped,
        foreign.files,
    )


def _renamed_path(fqn: str, new: str, path: Path, where: str) -> Path:
    """Return the keys of an entry that got another name: the first key as it is, and the rest of the name as one key,
    where it lies in a dict of tensors; otherwise one key for each part between dots."""
    if len(path) == 2 and fqn == f"{path[0]}.{path[1]}" and "." in new:
        first, _, rest = new.partition(".")
        return first, rest
    if all(isinstance(key, str) for key in path):
        return tuple(new.split("."))
    raise InvalidOption(f"{where}: {fqn!r} lies in a list, so it cannot be renamed; leave it as it is")
