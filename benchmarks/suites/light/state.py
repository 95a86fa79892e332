"""The measured states have a given number of tensors: parameters, and what AdamW keeps of each."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.harness.state import State

#: AdamW keeps two moments and a counter of each parameter, so a parameter is four tensors.
TENSORS_A_PARAMETER = 4
#: A layer has this many parameters, so that as many modules as a real model has are walked.
_PARAMETERS_A_LAYER = 4


class Layer(nn.Module):
    """Holds a few parameters of one size, as an expert or an adapter does."""

    def __init__(self, count: int, items: int) -> None:
        super().__init__()
        for number in range(count):
            self.register_parameter(f"weight_{number}", nn.Parameter(torch.randn(items)))


def adamw_state(tensors: int, items: int) -> State:
    """Make ``{"model", "optimizer"}`` of about ``tensors`` tensors with ``items`` float32 values each, after one step
    on random gradients. The gradients stay, for ``step``."""
    torch.manual_seed(0)
    layers = max(1, tensors // TENSORS_A_PARAMETER // _PARAMETERS_A_LAYER)
    count = max(1, tensors // TENSORS_A_PARAMETER // layers)
    model = nn.ModuleList(Layer(count, items) for _ in range(layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-2)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}
