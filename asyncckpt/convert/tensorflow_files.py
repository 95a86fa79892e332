"""Checkpoints of TensorFlow (``.ckpt``: an index and data files) in and out, by the names of variables."""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np
import torch

from asyncckpt.codecs.dtypes import NAMES
from asyncckpt.convert.exporting import Export
from asyncckpt.convert.source import Source, module
from asyncckpt.convert.stored import ORIGIN_FILE, StoredItem, check_overflow, origin_json, whole
from asyncckpt.convert.tensors import Holder, LoadedTensor, SourceTensor
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, InvalidOption, MissingExtra

PREFIX: Final = "model.ckpt"
_SHARD_BYTES: Final = 128 << 20
_CODES: Final = {name: code for code, name in NAMES.items()}
#: TensorFlow's own description of the objects that held the variables.
_OBJECT_GRAPH: Final = "_CHECKPOINTABLE_OBJECT_GRAPH"


def tensorflow() -> Any:
    """Return the library. Raises ``MissingExtra``."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as library
    except ImportError as error:
        raise MissingExtra(
            "checkpoints of TensorFlow need tensorflow: pip install 'asyncckpt[tensorflow]' (in an environment of its "
            "own, best)"
        ) from error
    return library


def read_tensorflow(path: str) -> Source:
    """Open a checkpoint of TensorFlow by its prefix (``model.ckpt``), its index, or the directory that has one. Its
    variables become the module ``model``, under their names. One tensor at a time is in memory, as TensorFlow reads
    them whole, and verified by the checksums in the index. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` and
    ``MissingExtra``."""
    library = tensorflow()
    prefix = _prefix(path)
    source = Source("tensorflow", path)
    folder, stem = os.path.split(prefix)
    for name in sorted(os.listdir(folder or ".")):
        if name == f"{stem}.index" or name.startswith(f"{stem}.data-"):
            source.read_by_others(os.path.join(folder, name))
    try:
        reader = library.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except (library.errors.OpError, ValueError) as error:
        raise CheckpointDamaged(f"{prefix}: TensorFlow cannot open it ({error!s:.200})") from error
    holder, tensors = Holder(), dict[str, SourceTensor]()
    for name in sorted(shapes):
        code = _CODES.get(dtypes[name].name)
        if name == _OBJECT_GRAPH:
            source.notes.append("TensorFlow's description of the objects that held the variables is not kept")
        elif code is None:
            source.lost[name] = f"a variable of {dtypes[name].name}, for which safetensors has no name"
        else:
            tensors[name] = LoadedTensor(code, shapes[name], _loading(library, reader, name, prefix), holder)
    source.components = [module("model", tensors)]
    source.notes.append(f"{len(tensors)} variables became the module 'model'")
    return source


def _loading(library: Any, reader: Any, name: str, prefix: str) -> Any:
    def load() -> Any:
        try:
            return reader.get_tensor(name)
        except library.errors.OpError as error:
            raise CheckpointDamaged(f"{prefix}: {name!r:.80} cannot be read ({error!s:.200})") from error

    return load


def _prefix(path: str) -> str:
    if path.endswith(".index"):
        return path.removesuffix(".index")
    if not os.path.isdir(path):
        return path
    found = sorted(name for name in os.listdir(path) if name.endswith(".index"))
    if len(found) != 1:
        there = ", ".join(found) or "none"
        raise CheckpointNotFound(f"{path}: it should have one index of TensorFlow, and has {there}; name the one meant")
    return os.path.join(path, found[0].removesuffix(".index"))


def write_tensorflow(job: Export) -> None:
    """Write a directory with the checkpoint ``model.ckpt``, which ``tf.train.load_checkpoint`` opens by name: one
    ``SaveV2`` a shard, then ``MergeV2Checkpoints``. A shard's tensors are in memory at a time."""
    library = tensorflow()
    shards: list[list[StoredItem]] = []
    room = 0
    for item in job.items:
        if not shards or item.nbytes > room:
            shards.append([])
            room = job.options.shard_bytes or _SHARD_BYTES
        shards[-1].append(item)
        room -= item.nbytes
    total, done = sum(item.nbytes for item in job.items), 0
    prefixes = []
    for number, shard in enumerate(shards):
        prefix = str(job.output.path / f"part-{number:05d}" / "shard")
        os.makedirs(os.path.dirname(prefix))
        values = [_value(library, job, item) for item in shard]
        names = [item.name for item in shard]
        library.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=values)
        prefixes.append(prefix)
        done += sum(item.nbytes for item in shard)
        job.progress("writing", done, total)
    library.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=prefixes, destination_prefix=str(job.output.path / PREFIX), delete_old_dirs=True
    )
    job.output.write(
        "checkpoint", f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'.encode()
    )
    job.output.write(ORIGIN_FILE, origin_json(job.checkpoint))


def tensorflow_dtype(library: Any, name: str) -> Any:
    """Return TensorFlow's dtype of this name, None where it has none."""
    for place in (library.dtypes, library.dtypes.experimental, library):
        found = getattr(place, name, None)
        if isinstance(found, library.DType):
            return found
    return None


def _value(library: Any, job: Export, item: StoredItem) -> Any:
    kind = tensorflow_dtype(library, NAMES[item.dtype])
    if kind is None:
        raise InvalidOption(
            f"{job.checkpoint.path}: {item.name!r:.80} is {NAMES[item.dtype]}, which TensorFlow lacks; --exclude it"
        )
    tensor = whole(job.checkpoint, item)
    check_overflow(job.checkpoint, [(item, tensor)])
    values = tensor.reshape(-1).view(torch.uint8).numpy().view(np.dtype(kind.as_numpy_dtype)).reshape(item.shape)
    return library.constant(values, dtype=kind)
