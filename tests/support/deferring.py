"""Tests of what is copied in the background need tensors that have earned to be deferred."""

from __future__ import annotations

import torch
from torch import nn

from asyncckpt import Checkpointer


def let_all_be_deferred(run: Checkpointer) -> Checkpointer:
    """Have everything that watched optimizers own deferred from the first save on, as if steps had shown before that it
    stays as it is."""
    run._starter._deferral.earned = lambda keys: frozenset(range(len(keys)))  # type: ignore[method-assign]
    return run


def with_momentum(width: int, layers: int, device: str = "cpu") -> tuple[nn.Sequential, torch.optim.SGD]:
    """Make a stack of square layers and its optimizer, which has stepped once and has gradients for the next step."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    return model, optimizer
