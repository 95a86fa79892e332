"""GGUF out: F32, F16, BF16 and Q8_0, with what llama.cpp and Transformers need to know of llama and gpt2."""

from __future__ import annotations

import json
import os
from typing import Any, Final

import numpy as np
import torch

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.convert import gguf_names
from asyncckpt.convert.exporting import Export
from asyncckpt.convert.gguf_names import Architecture
from asyncckpt.convert.stored import (
    Place,
    StoredItem,
    check_overflow,
    fill_places,
    origin,
    pieces_of,
    view_at,
    whole,
)
from asyncckpt.errors import InvalidOption, MissingExtra

#: GGUF's readers take no longer names, and no more dimensions.
_NAME_BYTES: Final = 63
_DIMENSIONS: Final = 4
_BLOCK: Final = 32  # elements of a row that Q8_0 scales together
_BLOCK_BYTES: Final = 34
_KINDS: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0"}
_INTEGERS: Final = ("I8", "I16", "I32", "I64")


def gguf() -> Any:
    """Return the library. Raises ``MissingExtra``."""
    try:
        import gguf as library
    except ImportError as error:
        raise MissingExtra("GGUF needs gguf: pip install 'asyncckpt[gguf]'") from error
    return library


def write_gguf(job: Export) -> None:
    """Write one file. Matrices get the kind that is asked for (by default that of their dtype), vectors are F32, as
    llama.cpp has them. Raises ``InvalidOption`` for names, shapes and dtypes that the format has no room for."""
    library = gguf()
    kind = (job.options.quantized or "").upper()
    if kind and kind not in _KINDS:
        raise InvalidOption(f"--quantized {job.options.quantized!r}: kinds are {', '.join(_KINDS)}")
    config, architecture = _architecture(job)
    tensors = [_Tensor(job, item, architecture, kind) for item in job.items if architecture is None or not item.tied_to]
    lost = {one.item.name: one.problem for one in tensors if one.problem}
    job.selection.check_losses(lost, job.checkpoint.path)
    tensors = [one for one in tensors if not one.problem]
    path = job.output.inside("")
    writer = library.GGUFWriter(path, architecture.name if architecture is not None else "unknown")
    for key, value in origin(job.checkpoint).items():
        writer.add_string(key, value)
    if architecture is not None and config is not None:
        _describe(writer, config, architecture, job)
    kinds = library.GGMLQuantizationType
    for one in tensors:
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.nbytes, raw_dtype=kinds[one.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = _aligned(os.path.getsize(path), writer.data_alignment)
    places = []
    for one in tensors:
        places.append(begin)
        begin = _aligned(begin + one.nbytes, writer.data_alignment)
    memory = job.output.mapped(path, begin)
    direct = [(one, one.view(memory, at)) for one, at in zip(tensors, places, strict=True) if one.kind != "Q8_0"]
    at = dict(zip((one.name for one in tensors), places, strict=True))
    filled = [
        Place(one.item.record, view, path=path if one.keeps_order() else None, offset=at[one.name])
        for one, view in direct
    ]
    fill_places(job.checkpoint, filled, job.progress)
    check_overflow(job.checkpoint, [(one.as_item(), view) for one, view in direct])
    blocks = [(one, at) for one, at in zip(tensors, places, strict=True) if one.kind == "Q8_0"]
    total, done = sum(one.item.count for one, _ in blocks), 0
    for one, begin in blocks:
        one.quantize(job, library, memory[begin : begin + one.nbytes])
        done += one.item.count
        job.progress("quantizing", done, total)
    _tell_fallbacks(job, tensors, kind)


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _tell_fallbacks(job: Export, tensors: list[_Tensor], kind: str) -> None:
    odd = [one.name for one in tensors if kind == "Q8_0" and len(one.shape) > 1 and one.kind != "Q8_0"]
    if odd:
        job.notes.append(
            f"{len(odd)} tensors are F16, as their rows are no multiples of {_BLOCK}: {', '.join(odd[:5])}"
        )


class _Tensor:
    """A tensor as it will be in the file: ``name``, ``shape`` (as NumPy has it), ``kind`` and size. ``problem`` says
    why it cannot be there."""

    def __init__(self, job: Export, item: StoredItem, architecture: Architecture | None, kind: str) -> None:
        self.item = item
        self.architecture = architecture
        self.problem = ""
        self.name = item.name
        if architecture is not None:
            self.name = architecture.to_gguf(item.name) or item.name
            if self.name == item.name and architecture.to_hf(item.name) is None:
                self.problem = f"no tensor of a {architecture.name}"
        self.shape = item.shape
        if architecture is not None and architecture.is_transposed(self.name):
            self.shape = item.shape[::-1]
        self.kind = self._kind(kind)
        if len(self.name.encode("utf-8", "backslashreplace")) > _NAME_BYTES:
            self.problem = f"a name of more than {_NAME_BYTES} bytes; --rename it"
        elif len(self.shape) > _DIMENSIONS:
            self.problem = f"{len(self.shape)} dimensions, and GGUF has {_DIMENSIONS} at most"
        elif not self.shape or 0 in self.shape:
            self.problem = "a tensor without dimensions or elements, which GGUF does not have"
        self.nbytes = item.count // _BLOCK * _BLOCK_BYTES if self.kind == "Q8_0" else item.count * self._item_bytes()

    def _item_bytes(self) -> int:
        return ITEM_BYTES.get(self.kind, 1)

    def _kind(self, asked: str) -> str:
        dtype = self.item.dtype
        if dtype in _INTEGERS:
            return dtype
        if dtype not in ("F32", "F16", "BF16"):
            self.problem = f"{dtype}, which GGUF does not have; --dtype fp32, say, converts floating ones"
            return "F32"
        if len(self.shape) < 2:
            return "F32"
        if asked == "Q8_0" and self.shape[-1] % _BLOCK:
            return "F16"
        return asked or dtype

    def as_item(self) -> StoredItem:
        """Return the item with the dtype that it gets here."""
        old = self.item
        return StoredItem(old.name, old.component, old.fqn, old.record, self.kind)

    def view(self, memory: torch.Tensor, begin: int) -> torch.Tensor:
        """Return the place for the tensor in the file, in the order of Transformers."""
        found = view_at(memory, begin, self.kind, self.shape)
        return found if self.architecture is None else self.architecture.hf_view(self.name, found)

    def keeps_order(self) -> bool:
        """Return whether the elements lie in the file in the order that they were stored in."""
        of = self.architecture
        return of is None or not (of.heads_of(self.name) or of.is_transposed(self.name))

    def quantize(self, job: Export, library: Any, memory: torch.Tensor) -> None:
        """Fill the tensor's bytes with blocks of Q8_0, a piece at a time."""
        old = self.item
        exact = StoredItem(old.name, old.component, old.fqn, old.record, "F32")
        width = self.shape[-1]
        row_bytes = width // _BLOCK * _BLOCK_BYTES
        rows = memory.view(-1, row_bytes)
        kind = library.GGMLQuantizationType.Q8_0
        if self.architecture is not None and self.architecture.is_transposed(self.name):
            turned = whole(job.checkpoint, exact).t()
            rows_at_once = max(1, (8 << 20) // width)
            starts = range(0, turned.shape[0], rows_at_once)
            pieces = iter([turned[start : start + rows_at_once].contiguous() for start in starts])
        else:
            pieces = pieces_of(job.checkpoint, exact)
        first = 0
        for piece in pieces:
            made = library.quants.quantize(piece.reshape(-1, width).numpy(), kind)
            count = made.shape[0]
            order = [self._row(row, rows.shape[0]) for row in range(first, first + count)]
            rows[torch.tensor(order)] = torch.from_numpy(np.ascontiguousarray(made))
            first += count

    def _row(self, row: int, rows: int) -> int:
        return row if self.architecture is None else self.architecture.gguf_row(self.name, row, rows)


def _architecture(job: Export) -> tuple[dict[str, Any] | None, Architecture | None]:
    """Return the config among the assets, and what it says of the model. Refuses what GGUF would make another model of,
    unless the user drops ``architecture``."""
    data = job.checkpoint.assets().get("config.json")
    if data is None:
        job.notes.append("no config.json among the assets: tensors have their own names, and no architecture is said")
        return None, None
    config: dict[str, Any] = json.loads(data)
    found = gguf_names.of_config(config)
    if isinstance(found, str):
        job.selection.check_losses({"architecture": found}, job.checkpoint.path)
        return None, None
    return config, found


def _describe(writer: Any, config: dict[str, Any], architecture: Architecture, job: Export) -> None:
    """Write the metadata that readers make the model of."""
    if architecture.name == "llama":
        rope = config.get("rope_parameters") or {}
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(architecture.heads)
        writer.add_head_count_kv(architecture.kv_heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // architecture.heads)
        writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    else:
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_name(config.get("_name_or_path") or architecture.name)
    _tokenizer(writer, config, job)


def _tokenizer(writer: Any, config: dict[str, Any], job: Export) -> None:
    """Write the vocabulary and the merges of a ``tokenizer.json`` with byte pairs."""
    data = job.checkpoint.assets().get("tokenizer.json")
    body = json.loads(data) if data is not None else {}
    model = body.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        job.notes.append("no tokenizer of byte pairs among the assets, so none is in the file")
        return
    names = {number: text for text, number in model["vocab"].items()}
    special = {one["id"]: one["content"] for one in body.get("added_tokens", ())}
    names |= special
    count = max(config["vocab_size"], max(names, default=0) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(count)])
    writer.add_token_types([3 if number in special else 1 if number in names else 5 for number in range(count)])
    merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges", ())]
    writer.add_token_merges(merges)
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if isinstance(config.get(key), int):
            add(config[key])
