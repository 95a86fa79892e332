"""Groups of zarr v3 in and out: each tensor is an array, by zarr-python."""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np
import torch

from asyncckpt.codecs.dtypes import ITEM_BYTES, NAMES
from asyncckpt.convert.exporting import Export
from asyncckpt.convert.source import Source, module
from asyncckpt.convert.stored import count_infinite, origin, pieces_of, refuse_overflow
from asyncckpt.convert.tensors import Holder, SlabsTensor, SourceTensor
from asyncckpt.errors import CheckpointDamaged, InvalidOption
from asyncckpt.formats.zarr import announce_dtypes

#: A chunk has about so many bytes.
_CHUNK_BYTES: Final = 32 << 20
_CODES: Final = {name: code for code, name in NAMES.items()}


def _numpy(code: str) -> np.dtype[Any]:
    """Return NumPy's dtype; those that NumPy itself lacks are of ``ml_dtypes``."""
    name = NAMES[code]
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        kind: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return kind
    return np.dtype(name)


def read_zarr(path: str) -> Source:
    """Open a zarr v3 group, or the directory of one: its arrays become the module ``model``, named by their paths with
    dots. Raises ``CheckpointDamaged``."""
    import zarr

    announce_dtypes()
    source = Source("zarr", path)
    try:
        try:
            group: Any = zarr.open_group(path, mode="r", zarr_format=3)
            arrays = sorted(_arrays(group, ""))
            metadata = dict(group.attrs)
        except Exception as error:  # zarr's own, of many kinds
            raise CheckpointDamaged(f"{path} is no zarr v3 group that can be read ({error!s:.200})") from error
        for where, _, files in os.walk(path):
            for file in sorted(files):
                source.read_by_others(os.path.join(where, file))
        holder = Holder()
        tensors: dict[str, SourceTensor] = {}
        for name, array in arrays:
            code = _CODES.get(str(array.dtype))
            if code is None:
                source.lost[name] = f"an array of {array.dtype}, for which safetensors has no name"
            else:
                tensors[name] = _tensor(array, code, holder)
        source.metadata = {str(key): str(value) for key, value in metadata.items()}
    except BaseException:
        source.close()
        raise
    source.components = [module("model", tensors)]
    source.notes.append(f"{len(tensors)} arrays became the module 'model'")
    return source


def _arrays(group: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, member in group.members():
        path = f"{prefix}.{name}" if prefix else name
        found += _arrays(member, path) if hasattr(member, "members") else [(path, member)]
    return found


def _tensor(array: Any, code: str, holder: Holder) -> SourceTensor:
    rows = int((array.shards or array.chunks or (1,))[0]) if array.ndim else 1
    little = _numpy(code)

    def load(first: int, last: int) -> Any:
        found = array[first:last] if array.ndim else array[()]
        return np.asarray(found).astype(little, copy=False).reshape(-1)

    return SlabsTensor(code, array.shape, rows, load, holder)


def write_zarr(job: Export) -> None:
    """Write a group with an array for each tensor, under each of its names, in chunks of some rows. Raises
    ``InvalidOption`` for a name that cannot be a file's."""
    import zarr

    announce_dtypes()
    group = zarr.open_group(str(job.output.path), mode="w", zarr_format=3, attributes=dict(origin(job.checkpoint)))
    total, done = sum(item.nbytes for item in job.items), 0
    for item in job.items:
        if "/" in item.name or item.name.startswith(("__", ".")) or item.name in ("", "zarr.json"):
            raise InvalidOption(f"{job.checkpoint.path}: {item.name!r:.80} cannot name an array of zarr; --rename it")
        row_bytes = item.nbytes // item.shape[0] if item.shape and item.shape[0] else 1
        rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
        chunks = tuple(max(1, size) for size in (min(rows, item.shape[0]), *item.shape[1:])) if item.shape else ()
        array: Any = group.create_array(
            item.name, shape=item.shape, dtype=_numpy(item.dtype), chunks=chunks, compressors=None
        )
        if not item.count:
            continue
        first = infinite = 0
        row = item.count // item.shape[0] if item.shape else 1
        for piece in pieces_of(job.checkpoint, item, chunks[0] * row * ITEM_BYTES[item.dtype] if item.shape else 8):
            infinite += count_infinite(item, piece)
            values = piece.view(torch.uint8).numpy().view(_numpy(item.dtype))
            if not item.shape:
                array[...] = values.reshape(())
            else:
                count = len(piece) // row
                array[first : first + count] = values.reshape(count, *item.shape[1:])
                first += count
            done += len(piece) * ITEM_BYTES[item.dtype]
            job.progress("writing", done, total)
        refuse_overflow(job.checkpoint, item, infinite)
