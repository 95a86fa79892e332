"""What GGUF calls the tensors of llama- and gpt2-shaped models, and how it orders their elements.

Llama's query and key rows lie in another order than in Transformers, because ggml rotates neighbouring pairs of a head
and Transformers its two halves; gpt2's matrices are transposed. Names alone would make another model of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

_LLAMA: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA_LAYER: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GPT2: Final = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
_GPT2_LAYER: Final = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
_TRANSPOSED: Final = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_HF_LAYER: Final = re.compile(r"(model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)\Z")
_GGUF_LAYER: Final = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)\Z")


@dataclass(frozen=True)
class Architecture:
    """A kind of model that GGUF and Transformers both know: its ``name``, and for llama how many ``heads`` and
    ``kv_heads`` its attention has."""

    name: str
    heads: int = 1
    kv_heads: int = 1

    def to_gguf(self, name: str) -> str | None:
        """Return what GGUF calls the tensor that Transformers calls ``name``; None where there is no such tensor."""
        whole, layer = (_LLAMA, _LLAMA_LAYER) if self.name == "llama" else (_GPT2, _GPT2_LAYER)
        if name in whole:
            return whole[name]
        found = _HF_LAYER.match(name)
        if found is None or found[3] not in layer or (found[1] == "model.layers") != (self.name == "llama"):
            return None
        return f"blk.{found[2]}.{layer[found[3]]}.{found[4]}"

    def to_hf(self, name: str) -> str | None:
        """Return what Transformers calls the tensor that GGUF calls ``name``; None where there is no such tensor."""
        whole, layer = (_LLAMA, _LLAMA_LAYER) if self.name == "llama" else (_GPT2, _GPT2_LAYER)
        for hf, gguf in whole.items():
            if gguf == name:
                return hf
        found = _GGUF_LAYER.match(name)
        for hf, gguf in layer.items():
            if found is not None and gguf == found[2]:
                start = "model.layers" if self.name == "llama" else "transformer.h"
                return f"{start}.{found[1]}.{hf}.{found[3]}"
        return None

    def is_transposed(self, gguf_name: str) -> bool:
        """Return whether GGUF has the transpose of the matrix."""
        return self.name == "gpt2" and gguf_name.startswith("blk.") and gguf_name.endswith(_TRANSPOSED)

    def heads_of(self, gguf_name: str) -> int:
        """Return how many heads the rows of the tensor belong to where they lie in another order; 0 for others."""
        if self.name == "llama" and ".attn_q." in gguf_name:
            return self.heads
        return self.kv_heads if self.name == "llama" and ".attn_k." in gguf_name else 0

    def hf_view(self, gguf_name: str, memory: torch.Tensor) -> torch.Tensor:
        """Return a view of a tensor in GGUF's order whose elements, row by row, are in the order of Transformers."""
        if self.is_transposed(gguf_name):
            return memory.t()
        heads = self.heads_of(gguf_name)
        if not heads:
            return memory
        half = memory.shape[0] // heads // 2
        return memory.view(heads, half, 2, *memory.shape[1:]).transpose(1, 2)

    def gguf_row(self, gguf_name: str, row: int, rows: int) -> int:
        """Return the number of the row in GGUF's order that has this number in the order of Transformers."""
        heads = self.heads_of(gguf_name)
        if not heads:
            return row
        size = rows // heads
        head, within = divmod(row, size)
        part, pair = divmod(within, size // 2)
        return head * size + pair * 2 + part


def of_config(config: Mapping[str, Any]) -> Architecture | str:
    """Return the architecture of a ``config.json``, or why GGUF would make another model of it."""
    kind = config.get("model_type")
    if kind == "gpt2":
        if config.get("activation_function", "gelu_new") != "gelu_new":
            return f"gpt2 with {config['activation_function']}, for which GGUF has no word"
        return Architecture("gpt2")
    if kind != "llama":
        return f"a model of the type {kind!r}; the order of elements is known for llama and gpt2 alone"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return f"llama with scaled rotations ({rope.get('rope_type', rope.get('type'))})"
    if config.get("attention_bias") or config.get("mlp_bias") or config.get("hidden_act", "silu") != "silu":
        return "llama with biases or another activation, which readers of GGUF would leave out"
    heads = int(config["num_attention_heads"])
    return Architecture("llama", heads, int(config.get("num_key_value_heads") or heads))
