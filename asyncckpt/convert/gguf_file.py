"""GGUF in: weights and metadata. What is quantized becomes float32, by the format's own library."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import torch

from asyncckpt.convert.gguf_names import Architecture
from asyncckpt.convert.gguf_out import gguf
from asyncckpt.convert.source import Source, module
from asyncckpt.convert.source_file import SourceFile
from asyncckpt.convert.tensors import FileTensor, RowsTensor, SourceTensor, ViewTensor
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.state.dtypes import DTYPES

_PLAIN: Final = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
#: Longer lists of metadata, such as a vocabulary, are as many values as a checkpoint's JSON can take.
_LIST_VALUES: Final = 4_000_000


def read_gguf(path: str) -> Source:
    """Open a GGUF file. Weights of llama and gpt2 get the names, and the order of elements, that Transformers has;
    those of other models stay as they are. The metadata becomes the asset ``gguf.json``, and where Transformers knows
    the model ``config.json``. Raises ``CheckpointDamaged`` and ``MissingExtra``."""
    library = gguf()
    source = Source("gguf", path)
    try:
        file = source.open_file(path)
        size = file.nbytes
        try:
            reader = library.GGUFReader(path)
            values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
            listed = list(reader.tensors)
        except Exception as error:  # a forged header can run into anything
            raise CheckpointDamaged(f"{path} is no GGUF file that can be read ({error!s:.200})") from error
        architecture = _architecture(values)
        tensors: dict[str, SourceTensor] = {}
        dequantized = 0
        for one in listed:
            if one.data_offset + one.n_bytes > size:
                raise CheckpointDamaged(f"{path}: tensor {one.name!r:.80} is cut off")
            name = (architecture.to_hf(one.name) if architecture is not None else None) or one.name
            tensors[name] = _tensor(source, path, file, one, architecture, library)
            dequantized += one.tensor_type.name not in _PLAIN
        _add_assets(source, path, values, architecture)
        if architecture is not None and "lm_head.weight" not in tensors:
            embedding = next((n for n in ("model.embed_tokens.weight", "transformer.wte.weight") if n in tensors), None)
            if embedding is not None:
                tensors["lm_head.weight"] = tensors[embedding]
    except BaseException:
        source.close()
        raise
    source.components = [module("model", tensors)]
    kind = architecture.name if architecture is not None else str(values.get("general.architecture"))
    names = "Transformers' names and order" if architecture is not None else "their own names and order"
    source.notes.append(f"{kind}: {len(tensors)} tensors became the module 'model', with {names}")
    if dequantized:
        source.notes.append(f"{dequantized} quantized tensors became float32")
    return source


def _architecture(values: dict[str, Any]) -> Architecture | None:
    kind = values.get("general.architecture")
    if kind == "gpt2":
        return Architecture("gpt2")
    heads = values.get("llama.attention.head_count")
    if kind != "llama" or not isinstance(heads, int) or heads < 1:
        return None
    kv_heads = values.get("llama.attention.head_count_kv", heads)
    return Architecture("llama", heads, kv_heads) if isinstance(kv_heads, int) and kv_heads > 0 else None


def _tensor(
    source: Source, path: str, file: SourceFile, one: Any, architecture: Architecture | None, library: Any
) -> SourceTensor:
    shape = tuple(int(size) for size in reversed(one.shape.tolist()))
    kind = one.tensor_type.name
    if kind in _PLAIN:
        transposed = architecture is not None and architecture.is_transposed(one.name) and len(shape) == 2
        reordered = architecture is not None and architecture.heads_of(one.name)
        if not transposed and not reordered:
            return FileTensor(kind, shape, file, one.data_offset, path)
        assert architecture is not None
        data = torch.frombuffer(
            source.map_file(path)[one.data_offset : one.data_offset + one.n_bytes], dtype=DTYPES[kind]
        )
        if reordered and shape[0] % (2 * reordered):
            raise CheckpointDamaged(f"{path}: {one.name!r:.80} has {shape[0]} rows, for {reordered} heads")
        view = architecture.hf_view(one.name, data.view(shape))
        return ViewTensor(view, shape[::-1] if transposed else shape)
    block, block_bytes = library.GGML_QUANT_SIZES[one.tensor_type]
    if not shape or shape[-1] % block:
        raise CheckpointDamaged(f"{path}: {one.name!r:.80} has rows that are no multiples of a block")
    row_bytes = shape[-1] // block * block_bytes
    rows = np.frombuffer(source.map_file(path)[one.data_offset : one.data_offset + one.n_bytes], np.uint8)
    rows = rows.reshape(-1, row_bytes)

    def decoded(number: int) -> Any:
        return library.quants.dequantize(rows[number : number + 1], one.tensor_type).astype(np.float32, copy=False)

    if architecture is not None and architecture.is_transposed(one.name) and len(shape) == 2:
        turned = torch.from_numpy(np.concatenate([decoded(row) for row in range(rows.shape[0])]))
        return ViewTensor(turned.view(shape).t())
    at = (lambda row: architecture.gguf_row(one.name, row, rows.shape[0])) if architecture is not None else int
    flat = RowsTensor("F32", (rows.shape[0], shape[-1]), lambda row: decoded(at(row)))
    flat.shape = shape
    return flat


def _add_assets(source: Source, path: str, values: dict[str, Any], architecture: Architecture | None) -> None:
    kept = {name: value for name, value in values.items() if not isinstance(value, list) or len(value) < _LIST_VALUES}
    for name in values.keys() - kept.keys():
        source.lost[name] = "a very long list of metadata"
    source.assets["gguf.json"] = json.dumps(kept, default=str).encode()
    if architecture is None:
        return
    try:
        import os

        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(os.path.dirname(path) or ".", gguf_file=os.path.basename(path))
    except Exception as error:  # Transformers is not installed, or takes this file for another model
        source.notes.append(f"no config.json was made of the metadata ({error!s:.100})")
        return
    kind = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[architecture.name]
    config.architectures = [kind]
    source.assets["config.json"] = config.to_json_string(use_diff=False).encode()
