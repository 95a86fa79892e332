"""``convert`` turns what plain DCP wrote into a checkpoint of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.catalog.names import DEFAULT
from asyncckpt.codecs import digests
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.convert.dcp.native_reader import read_foreign
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.integrations.dcp.names import place_of
from asyncckpt.integrations.dcp.session import THREADS, WriterSession
from asyncckpt.manifest.records import BoxedRecord, BoxRecord
from asyncckpt.state.dtypes import CODES
from asyncckpt.types import LayoutOptions, LocalTensor, TensorSpec

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, slots=True)
class Converted:
    """Tells what ``convert`` wrote.

    ``path`` is the new checkpoint's directory, ``tensors`` their number, ``nbytes`` their files' size in bytes.
    ``skipped`` maps the FQN of each value that only a pickle can hold to the reason why it was left out.
    """

    path: str
    step: int
    tensors: int
    nbytes: int
    skipped: Mapping[str, str] = field(default_factory=dict)


def convert(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    step: int,
    *,
    skip_unsupported: bool = False,
    overwrite: bool = False,
    digest: str = "xxh3-128",
    metrics: Mapping[str, float] | None = None,
) -> Converted:
    """Write what plain DCP left in the directory ``source`` into ``run`` as ``step``: tensors bit for bit, as the boxes
    they were saved in, and plain values. The result verifies, restores and exports like any other checkpoint.

    No pickle is executed. Where values are more than plain, ``UnsupportedValue`` names them all; with
    ``skip_unsupported`` they are left out, logged as a warning and listed instead. ``overwrite`` replaces a checkpoint
    of the same step. ``digest`` is the algorithm that proves the new files' bytes, as in ``WriterOptions``. Also raises
    ``CheckpointDamaged`` where the source does not fit together (it has no digests: damage inside tensors cannot be
    seen), ``CheckpointNotFound``, ``StepExists`` and ``RunLocked``. Blocks until the checkpoint is durable; tensors are
    read as they are written, in extents of 8 MiB.
    """
    take = digests.get(digest)
    foreign = read_foreign(source)
    if foreign.skipped:
        shown = "; ".join(foreign.skipped.values())
        if not skip_unsupported:
            raise UnsupportedValue(f"{os.fspath(source)}: {shown}. Pass skip_unsupported=True to convert the rest")
        log.warning("%s: left out: %s", os.fspath(source), shown)
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
    live, name = WriterSession(), DEFAULT.format(step=step)
    directory = os.path.abspath(os.fspath(run))
    try:
        attempt = live.begin(directory, name, step, overwrite=overwrite)
        files = live.write(attempt, shards, pieces, take, THREADS)
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
        )
    finally:
        live.close()
    return Converted(
        os.path.join(directory, name), step, len(records), sum(shard.nbytes for shard in shards), foreign.skipped
    )
