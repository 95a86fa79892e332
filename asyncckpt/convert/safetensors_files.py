"""Safetensors in: one file, or shards with the index that says which of them has which tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from asyncckpt.convert.source import Source, module
from asyncckpt.convert.stored import ORIGIN_KEYS
from asyncckpt.convert.tensors import FileTensor, SourceTensor
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound
from asyncckpt.formats import safetensors

INDEX = ".safetensors.index.json"
#: These keys of a header's metadata say something about the file, and are no second names of tensors.
_NO_NAMES = ("format", *ORIGIN_KEYS)


def read_safetensors(path: str) -> Source:
    """Open a ``.safetensors`` file, an index, or a directory with either. Raises ``CheckpointNotFound`` and
    ``CheckpointDamaged``."""
    source = Source("safetensors", path)
    try:
        tensors = tensors_at(source, path)
    except BaseException:
        source.close()
        raise
    source.components = [module("model", tensors)]
    source.notes.append(f"{len(tensors)} tensors became the module 'model'")
    return source


def tensors_at(source: Source, path: str) -> dict[str, SourceTensor]:
    """Return the tensors by name of a file, an index or a directory; ``source`` holds the files open."""
    if os.path.isdir(path):
        path = file_in(path)
    if not path.endswith(".index.json"):
        return tensors_of_file(source, path)
    return _sharded(source, path)


def file_in(folder: str) -> str:
    """Return the index in a directory, or the only file. Raises ``CheckpointNotFound``."""
    names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith(INDEX)]
    files = [name for name in names if name.endswith(".safetensors")]
    if "model" + INDEX in indexes:
        indexes = ["model" + INDEX]
    if "model.safetensors" in files and not indexes:
        files = ["model.safetensors"]
    found = indexes or files
    if len(found) != 1:
        there = ", ".join(found) or "none"
        raise CheckpointNotFound(
            f"{folder}: it should have one .safetensors file, or one index, and has {there}; name the one that is meant"
        )
    return os.path.join(folder, found[0])


def tensors_of_file(source: Source, path: str) -> dict[str, SourceTensor]:
    """Return the tensors of one file. Raises ``CheckpointDamaged`` where its header and its size do not fit."""
    file = source.open_file(path)
    size = file.nbytes
    length = safetensors.header_length(os.pread(file.fd, 8, 0), size, path)
    head = os.pread(file.fd, 8 + length, 0)
    ranges = safetensors.parse_header(head, size, path)
    extra = json.loads(head[8 : 8 + length]).get("__metadata__") or {}
    if extra.get("format") == safetensors.ENCODED_FORMAT:
        raise CheckpointDamaged(f"{path} is a compressed shard of a checkpoint of this library; export that checkpoint")
    found: dict[str, SourceTensor] = {
        one.spec.name: FileTensor(one.spec.dtype, one.spec.shape, file, one.begin, path) for one in ranges
    }
    for key, value in extra.items():
        if (
            key not in _NO_NAMES and key not in found and value in found
        ):  # a tied tensor's other name, as safetensors' save_model says it
            found[key] = found[value]
        elif key != "format":
            source.metadata[str(key)] = str(value)
    return found


def _sharded(source: Source, index: str) -> dict[str, SourceTensor]:
    places = weight_map(source, index)
    folder = os.path.dirname(index)
    found: dict[str, SourceTensor] = {}
    for file in dict.fromkeys(places.values()):
        for name, tensor in tensors_of_file(source, os.path.join(folder, file)).items():
            if places.get(name, file) != file:
                continue  # a copy that the index does not mean
            if name in found:
                raise CheckpointDamaged(f"{index}: {name!r:.80} lies in two files, and the index names neither")
            found[name] = tensor
    missing = [name for name in places if name not in found]
    if missing:
        raise CheckpointDamaged(f"{index} lists {', '.join(missing[:5])} ({len(missing)} in all), which no file has")
    return found


def weight_map(source: Source, index: str) -> dict[str, str]:
    """Return which file an index names for each tensor. Raises ``CheckpointDamaged`` for one that leads elsewhere."""
    try:
        body: Any = json.loads(source.read_small(index))
        places = body["weight_map"]
        names: Sequence[Any] = list(places.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointDamaged(f"{index} is no index of shards: it has no weight_map") from error
    for name, file in names:
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise CheckpointDamaged(f"{index} names a file {file!r:.80} for {name!r:.80} that is not beside it")
    return dict(names)
