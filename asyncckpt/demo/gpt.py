"""The demo's GPT predicts bytes. It is big enough that a save takes a visible time, and small enough for one CPU
core."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class GptOptions:
    """The defaults give 10.7 million parameters: 128 MB of training state with AdamW in fp32."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    context: int = 64
    dropout: float = 0.1


class Block(nn.Module):
    """Applies attention and an MLP, each after a norm."""

    def __init__(self, options: GptOptions) -> None:
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.dropout = options.dropout
        self.norm_attention = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=rate)
        x = x + self._drop(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self._drop(self.down(functional.gelu(self.up(self.norm_mlp(x)))))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)


class Gpt(nn.Module):
    """Maps bytes ``[batch, length]`` to logits ``[batch, length, 256]``. The head and the embedding share their
    weights."""

    def __init__(self, options: GptOptions) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, options.width)
        self.position = nn.Embedding(options.context, options.width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits
