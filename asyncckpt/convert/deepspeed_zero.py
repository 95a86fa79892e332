"""Checkpoints of DeepSpeed's ZeRO 1 to 3 in: the float32 weights that the ranks hold parts of, put together.

The arithmetic is that of DeepSpeed's ``zero_to_fp32``, which the tests compare with. That script unpickles the files,
which runs what a forger put there; here nothing is executed, and no part is in memory before it is written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.convert import torch_file
from asyncckpt.convert.source import Source, module
from asyncckpt.convert.tensors import PartsTensor, SourceTensor, ViewTensor
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedValue
from asyncckpt.state.dtypes import DTYPES

LATEST: Final = "latest"
_OPTIMIZER: Final = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt\Z")
_MODEL: Final = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt\Z")


def read_zero(path: str) -> Source:
    """Open a directory that DeepSpeed saved into, of which the file ``latest`` names the checkpoint, or the
    checkpoint's own directory. Raises ``CheckpointNotFound``, ``CheckpointDamaged``, and ``UnsupportedValue`` for
    model parallelism and partitioned experts."""
    source = Source("deepspeed", path)
    try:
        folder = _folder(source, path)
        optimizers = _files(folder, _OPTIMIZER)
        states = [_content(source, file) for file in _files(folder, _MODEL)]
        parts = [_field(_content(source, file), "optimizer_state_dict", dict, file) for file in optimizers]
        tensors = _merged(states, parts, folder)
    except BaseException:
        source.close()
        raise
    source.lost.clear()  # of the optimizer and of the program, of which the notes tell
    source.components = [module("model", tensors)]
    source.notes.append(
        f"ZeRO {parts[0].get('zero_stage')}, {len(parts)} ranks: {len(tensors)} tensors, parameters as float32, became "
        f"the module 'model'; the optimizer's moments and the program's state were not taken"
    )
    return source


def _folder(source: Source, path: str) -> str:
    latest = os.path.join(path, LATEST)
    if not os.path.isfile(latest):
        return path
    tag = source.read_small(latest, 4096).decode("utf-8", "replace").strip()
    if not tag or os.path.basename(tag) != tag or tag in (".", ".."):
        raise CheckpointDamaged(f"{latest} names {tag!r:.80}, which is no directory beside it")
    return os.path.join(path, tag)


def _files(folder: str, pattern: re.Pattern[str]) -> list[str]:
    """Return the files of all ranks, in their order."""
    if not os.path.isdir(folder):
        raise CheckpointNotFound(f"{folder}: no such directory")
    found = [(match, name) for name in os.listdir(folder) if (match := pattern.match(name))]
    if not found:
        raise CheckpointNotFound(f"{folder}: no files of DeepSpeed's ZeRO ({pattern.pattern}) in it")
    if any(int(match[2]) for match, _ in found):
        raise UnsupportedValue(f"{folder}: tensors are divided over ranks by model parallelism, which cannot be undone")
    return [os.path.join(folder, name) for _, name in sorted(found, key=lambda one: int(one[0][1] or 0))]


def _content(source: Source, file: str) -> Mapping[str, Any]:
    content = torch_file.content_of(source, file)
    if not isinstance(content, Mapping):
        raise CheckpointDamaged(f"{file} should be a dict, and is a {type(content).__name__}")
    return content


def _field(content: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise CheckpointDamaged(f"{where} lacks {name!r}, or it is of another type")
    return value


def _merged(
    states: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]], folder: str
) -> dict[str, SourceTensor]:
    stage, ranks = parts[0].get("zero_stage"), parts[0].get("partition_count")
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if stage not in (1, 2, 3) or ranks != len(parts):
        raise CheckpointDamaged(f"{folder}: ZeRO {stage} of {ranks} ranks has the files of {len(parts)}")
    if any(states[0].get(key) is not None for key in ("ds_autoep_layers", "autoep_layers")):
        raise UnsupportedValue(
            f"{folder}: experts are divided over ranks; DeepSpeed's ds_to_universal puts them together"
        )
    found = _buffers(states[0], folder)
    found |= _frozen(states, folder, stage)
    shapes = _field(states[0], "param_shapes", list, folder)
    if not all(isinstance(group, Mapping) for group in shapes):
        raise CheckpointDamaged(f"{folder}: param_shapes are of another type")
    found |= _of_stage_3(parts, shapes, folder) if stage == 3 else _of_stage_2(parts, shapes, folder)
    for alias, owner in (states[0].get("shared_params") or {}).items():
        if owner in found:
            found[alias] = found[owner]
    return found


def _buffers(state: Mapping[str, Any], folder: str) -> dict[str, SourceTensor]:
    """Return the buffers; those in half precision become float32, as in ``zero_to_fp32``."""
    modules = _field(state, "module", Mapping, folder)
    found: dict[str, SourceTensor] = {}
    for name in _field(state, "buffer_names", list, folder):
        tensor = modules.get(name)
        if isinstance(tensor, SourceTensor):
            widened = DTYPES[tensor.dtype].is_floating_point and tensor.dtype != "F32"
            found[name] = ViewTensor(tensor.whole().float()) if widened else tensor
    return found


def _frozen(states: Sequence[Mapping[str, Any]], folder: str, stage: int) -> dict[str, SourceTensor]:
    shapes = states[0].get("frozen_param_shapes") or {}
    found: dict[str, SourceTensor] = {}
    for name, shape in shapes.items():
        held = [_field(state, "frozen_param_fragments", Mapping, folder).get(name) for state in states]
        if stage < 3:
            held = held[:1]
        if not all(isinstance(one, SourceTensor) for one in held):
            raise CheckpointDamaged(f"{folder}: the frozen parameter {name!r:.80} is not there")
        pieces = [(one, 0, one.count) for one in held]
        found[name] = _joined(pieces, tuple(shape), held[0].dtype, f"{folder}: {name}")
    return found


def _groups(part: Mapping[str, Any], key: str, folder: str) -> list[SourceTensor]:
    groups: list[SourceTensor] = _field(part, key, list, folder)
    if not groups or not all(isinstance(one, SourceTensor) and len(one.shape) == 1 for one in groups):
        raise CheckpointDamaged(f"{folder}: {key} are no flat tensors")
    return groups


def _of_stage_2(
    parts: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], folder: str
) -> dict[str, SourceTensor]:
    """Return the parameters of stages 1 and 2: each group is one long vector, of which each rank has a part."""
    by_rank = [_groups(part, "single_partition_of_fp32_groups", folder) for part in parts]
    paddings = parts[0].get("param_alignment_paddings")
    found: dict[str, SourceTensor] = {}
    for number, group in enumerate(shapes):
        vector = [groups[number] for groups in by_rank]
        at = 0
        for index, (name, shape) in enumerate(group.items()):
            count = math.prod(shape)
            pieces = _range(vector, at, count, f"{folder}: {name}")
            found[name] = _joined(pieces, tuple(shape), vector[0].dtype, f"{folder}: {name}")
            at += count + (paddings[number][index] if paddings is not None else 0)
        align, there = 2 * len(parts), sum(one.count for one in vector)
        if -(-at // align) != -(-there // align):
            raise CheckpointDamaged(f"{folder}: group {number} has {there} elements, and its parameters {at}")
    return found


def _of_stage_3(
    parts: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], folder: str
) -> dict[str, SourceTensor]:
    """Return the parameters of stage 3: each rank has a part of each, one after the other."""
    by_rank = [_groups(part, "fp32_flat_groups", folder) for part in parts]
    ranks, at = len(parts), 0
    found: dict[str, SourceTensor] = {}
    for group in shapes:
        for name, shape in group.items():
            count = math.prod(shape)
            share = -(-count // ranks)
            pieces = []
            for rank, groups in enumerate(by_rank):
                mine = min(share, max(0, count - rank * share))
                pieces += _range(groups, at, mine, f"{folder}: {name}")
            found[name] = _joined(pieces, tuple(shape), by_rank[0][0].dtype, f"{folder}: {name}")
            at += share
    if at != sum(one.count for one in by_rank[0]):
        raise CheckpointDamaged(f"{folder}: the ranks' parts have other sizes than the parameters")
    return found


def _range(vector: Sequence[SourceTensor], first: int, count: int, where: str) -> list[tuple[SourceTensor, int, int]]:
    """Return which parts of the tensors are ``count`` elements of them all, one after the other, from ``first`` on."""
    found = []
    for one in vector:
        begin, end = max(0, first), min(one.count, first + count)
        if begin < end:
            found.append((one, begin, end - begin))
        first -= one.count
    if sum(part[2] for part in found) != count:
        raise CheckpointDamaged(f"{where} is not all there")
    return found


def _joined(
    pieces: Sequence[tuple[SourceTensor, int, int]], shape: tuple[int, ...], dtype: str, where: str
) -> SourceTensor:
    """Return the tensor of a shape whose elements are those of the pieces; what is left of them is padding."""
    if any(one.dtype != dtype for one, _, _ in pieces):
        raise CheckpointDamaged(f"{where} is stored in several dtypes")
    if not math.prod(shape):
        return ViewTensor(torch.empty(shape, dtype=DTYPES[dtype]))
    item = ITEM_BYTES[dtype]
    return PartsTensor(dtype, shape, [(one, first * item, count * item) for one, first, count in pieces], where)
