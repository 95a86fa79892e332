"""The measured training states are what a run of that size would hand to ``save``, without having trained for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

State: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int


#: ``gpt2`` has the shapes of GPT-2 small: 124.4 M parameters in 148 tensors, 1.49 GB with AdamW in fp32. ``small`` is
#: the same model at 50 MB, to try the harness.
SIZES = {
    "small": ModelSize(layers=4, width=256, heads=4, vocabulary=4096, context=256),
    "gpt2": ModelSize(layers=12, width=768, heads=12, vocabulary=50257, context=1024),
}


class Block(nn.Module):
    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.ln_1 = nn.LayerNorm(size.width)
        self.attention = nn.Linear(size.width, 3 * size.width)
        self.attention_out = nn.Linear(size.width, size.width)
        self.ln_2 = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.attention(self.ln_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: torch.Tensor = self.down(functional.gelu(self.up(self.ln_2(x))))
        return x + hidden


class GPT(nn.Module):
    """A model of GPT-2's shape; ``forward`` returns the loss of predicting each next token. The head is tied."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.wte = nn.Embedding(size.vocabulary, size.width)
        self.wpe = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_state(size: str) -> State:
    """Make ``{"model", "optimizer"}`` after one AdamW step on random gradients: every moment is there and
    incompressible.

    Blocks for some seconds at ``gpt2``; the gradients are freed again.
    """
    torch.manual_seed(0)
    model = GPT(SIZES[size])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"model": model, "optimizer": optimizer}


def plain_state(count: int, tensor_bytes: int) -> State:
    """Make one component of ``count`` float32 tensors of ``tensor_bytes`` each."""
    torch.manual_seed(0)
    return {"weights": {f"tensor.{i:05d}": torch.randn(tensor_bytes // 4) for i in range(count)}}


def flat_tensors(state: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Map component and name to the live tensor; a tied one appears under its first name only."""
    flat: dict[str, dict[str, torch.Tensor]] = {}
    for component, value in state.items():
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in _named(value):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[name] = tensor
        flat[component] = found
    return flat


def all_tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return every tensor of a state once."""
    return [tensor for tensors in flat_tensors(state).values() for tensor in tensors.values()]


def _named(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.optim.Optimizer):
        for number, entries in enumerate(value.state.values()):
            for key, tensor in entries.items():
                yield f"state.{number}.{key}", tensor
    else:
        tensors = value.state_dict() if isinstance(value, nn.Module) else value
        yield from tensors.items()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether shapes and bytes are equal: NaNs and signed zeros must match too."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(
        first.detach().contiguous().reshape(-1).view(torch.uint8),
        second.detach().contiguous().reshape(-1).view(torch.uint8),
    )
