"""``export_checkpoint`` writes what is chosen of a checkpoint in another format; what the formats share stands here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt.convert.output import Output, output
from asyncckpt.convert.selection import Selection
from asyncckpt.convert.source import Progress
from asyncckpt.convert.stored import StoredItem, components, items, losses_beside, origin
from asyncckpt.errors import InvalidOption
from asyncckpt.read.opening import OpenCheckpoint

#: The dtypes that ``--dtype`` names.
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What an export may be told beside what to take and where to put it. ``shard_bytes``: the size after which a
    format with several files begins another one (None: the format's own, or one file). ``quantized``: a kind of GGUF,
    such as ``Q8_0``. ``module``: the module itself, for a format that stores a program, and ``inputs`` that it is
    called with."""

    shard_bytes: int | None = None
    quantized: str | None = None
    module: torch.nn.Module | None = None
    inputs: tuple[Any, ...] = ()


@dataclass(slots=True)
class Export:
    """One export. ``items`` are the tensors, ``components`` where they lie, ``what`` the user's word for those."""

    checkpoint: OpenCheckpoint
    output: Output
    items: list[StoredItem]
    components: Sequence[str]
    what: str
    dtype: torch.dtype | None
    selection: Selection
    progress: Progress
    options: ExportOptions
    notes: list[str] = field(default_factory=list)

    def refuse_losses(self, losses: Mapping[str, str] | None = None) -> dict[str, str]:
        """Refuse what a format of tensors alone would lose, unless the user drops it: see ``Selection.check_losses``.
        ``losses``: more of that, by name."""
        beside = losses_beside(self.checkpoint.manifest, self.components, self.checkpoint.trees)
        return self.selection.check_losses({**beside, **(losses or {})}, self.checkpoint.path)


@dataclass(frozen=True, slots=True)
class Exported:
    """Tells what ``export_checkpoint`` wrote: where, its size in bytes, how many tensors, in ``notes`` what should be
    known about it, and in ``source`` what the result records of the checkpoint that it was made of."""

    path: str
    format: str
    nbytes: int
    tensors: int
    notes: Sequence[str] = ()
    source: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes one format. ``folder``: it makes a directory. ``trees``: it looks after values that are no tensors itself.
    ``choose``: returns which component the user's word means, where the format has only room for one."""

    write: Callable[[Export], None]
    folder: bool = False
    trees: bool = False
    choose: Callable[[OpenCheckpoint, str], str] = lambda _checkpoint, what: what


def export_with(
    writer: Writer,
    format: str,
    checkpoint: OpenCheckpoint,
    out: str | os.PathLike[str],
    *,
    what: str = "weights",
    dtype: torch.dtype | None = None,
    selection: Selection | None = None,
    overwrite: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
    options: ExportOptions | None = None,
) -> Exported:
    """Write what is chosen of an open checkpoint with ``writer``; see ``formats.export_checkpoint``."""
    selection = selection or Selection()
    checkpoint.check_small_files()
    what = writer.choose(checkpoint, what)
    chosen = components(checkpoint.manifest, what, checkpoint.path)
    with output(out, folder=writer.folder, overwrite=overwrite) as result:
        found = items(checkpoint, chosen, selection, dtype)
        job = Export(checkpoint, result, found, chosen, what, dtype, selection, progress, options or ExportOptions())
        if not writer.trees:
            if not found:
                raise InvalidOption(f"{checkpoint.path}: {what!r} has no tensors; export it to a .pt")
            job.refuse_losses()
        selection.check_used(checkpoint.path)
        writer.write(job)
        nbytes = result.publish(overwrite=overwrite)
    return Exported(str(result.target), format, nbytes, len(found), tuple(job.notes), origin(checkpoint))
