"""The states that are measured on a GPU, and the training that goes on beside."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness.state import GPT, SIZES, ModelSize, State

#: What a peer asks to be put round ``optimizer.step``.
Guard = Callable[[], contextlib.AbstractContextManager[object]]
#: 759 M parameters in 292 tensors: 9.1 GB with fused AdamW, in 1,168 tensors.
LARGE = ModelSize(layers=24, width=1536, heads=24, vocabulary=50257, context=1024)
_SIZES = {**SIZES, "large": LARGE}
#: 6,000 parameters of a few KiB are 24,000 tensors with their moments and step counters.
MANY_PARAMETERS = 6_000
_MANY_ITEMS = 1_400
#: Sequences a batch that are tried, until an iteration takes as long as is wanted.
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32)
_WARM = 3


def gpt_state(size: str, device: str) -> State:
    """Make a model of that size and its optimizer, which has stepped once, on ``device``."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(_SIZES[size])
    return {"model": model, "optimizer": _stepped(model, device)}


def many_state(device: str, parameters: int = MANY_PARAMETERS) -> State:
    """Make a state of many small tensors on ``device``."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(_MANY_ITEMS, device=device) for _ in range(parameters)])
    return {"model": model, "optimizer": _stepped(model, device)}


def _stepped(model: nn.Module, device: str) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.startswith("cuda"))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def trainer(state: State, device: str, batch: int, guard: Guard = contextlib.nullcontext) -> Callable[[], float]:
    """Return what makes one iteration and returns its loss. ``guard``: what the optimizer's step is in.

    An iteration ends in ``loss.item()``, as loops do: one that ends in ``torch.cuda.synchronize()`` would wait for
    copies that training has nothing to do with."""
    model, optimizer = state["model"], state["optimizer"]
    length = min(1024, model.size.context)
    tokens = torch.randint(0, model.size.vocabulary, (batch, length), device=device)

    def iterate() -> float:
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            loss = model(tokens)
        loss.backward()
        with guard():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return iterate


def calibrated(state: State, device: str, wanted_seconds: float) -> int:
    """Return the batch with which iterations take about as long as is wanted. Blocks for seconds."""
    best: tuple[float, int] | None = None
    for batch in _BATCHES:
        iterate = trainer(state, device, batch)
        for _ in range(_WARM):
            iterate()
        seconds = []
        for _ in range(_WARM):
            began = time.perf_counter()
            iterate()
            seconds.append(time.perf_counter() - began)
        found = statistics.median(seconds)
        if best is not None and abs(found - wanted_seconds) > best[0]:
            break
        best = abs(found - wanted_seconds), batch
        if found > wanted_seconds:
            break
    assert best is not None
    return best[1]
