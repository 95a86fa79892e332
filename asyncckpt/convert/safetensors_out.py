"""Safetensors out: one file, or shards and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.convert.exporting import Export
from asyncckpt.convert.stored import ORIGIN_KEYS, Place, StoredItem, check_overflow, fill_places, origin, view_at
from asyncckpt.errors import InvalidOption
from asyncckpt.formats import safetensors
from asyncckpt.types import TensorSpec

#: Shards of a directory have up to so many bytes, as those of Transformers.
SHARD_BYTES = 5_000_000_000


def write_file(job: Export) -> None:
    """Write one file. A tied tensor lies in it once; the file's metadata maps its other names to that."""
    write_shards(job, job.items, [_ordered(job.items)], lambda _n, _of: "")


def write_folder(job: Export, stem: str = "model") -> None:
    """Write shards, and an index where there are several."""
    limit = job.options.shard_bytes or SHARD_BYTES
    if limit < 1:
        raise InvalidOption(f"the size of a shard must be at least a byte, not {limit}")
    shards: list[list[StoredItem]] = []
    room = 0
    for item in _ordered(job.items):
        if not shards or item.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= item.nbytes

    def name(number: int, count: int) -> str:
        return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"

    places = write_shards(job, job.items, shards or [[]], name)
    if len(shards) > 1:
        size = sum(item.nbytes for shard in shards for item in shard)
        body = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        job.output.write(f"{stem}.safetensors.index.json", json.dumps(body, indent=2).encode())


def write_shards(
    job: Export, items: Sequence[StoredItem], shards: Sequence[Sequence[StoredItem]], name: Callable[[int, int], str]
) -> dict[str, str]:
    """Write each list of tensors into a file; return the file of each tensor by name. ``name(number, count)`` names the
    files."""
    ties = {item.name: item.tied_to.name for item in items if item.tied_to is not None}
    for alias in ties:
        if alias in ("format", *ORIGIN_KEYS):
            raise InvalidOption(
                f"{job.checkpoint.path}: {alias!r} is a second name of {ties[alias]!r:.80}, and safetensors says "
                f"something else under it; --rename it, or --exclude it"
            )
    places: list[Place] = []
    filled = []
    files: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = name(number, len(shards))
        for item in shard:
            check_name(job, item.name)
            files[item.name] = file
        metadata = origin(job.checkpoint) | _ties_of(ties, shard)
        specs = [TensorSpec(item.name, item.dtype, item.shape, item.nbytes) for item in shard]
        header, begins, nbytes = safetensors.image(specs, metadata)
        memory = job.output.create(file, nbytes)
        memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for item, begin in zip(shard, begins, strict=True):
            target = view_at(memory, begin, item.dtype, item.shape)
            places.append(Place(item.record, target, path=job.output.inside(file), offset=begin))
            filled.append((item, target))
    fill_places(job.checkpoint, places, job.progress)
    check_overflow(job.checkpoint, filled)
    return files


def check_name(job: Export, name: str) -> None:
    """Raise ``InvalidOption`` for a name that the format has no room for."""
    if name == "__metadata__" or any("\ud800" <= char <= "\udfff" for char in name):
        raise InvalidOption(
            f"{job.checkpoint.path}: safetensors has no room for the name {name!r:.80}; export to a .pt, or --rename it"
        )


def _ties_of(ties: Mapping[str, str], shard: Sequence[StoredItem]) -> dict[str, str]:
    there = {item.name for item in shard}
    return {alias: name for alias, name in ties.items() if name in there}


def _ordered(items: Sequence[StoredItem]) -> list[StoredItem]:
    """Return each tensor once, by descending item size, so that each begins at a multiple of its item size."""
    once = [item for item in items if item.tied_to is None]
    return sorted(once, key=lambda item: (-ITEM_BYTES[item.dtype], item.name))
