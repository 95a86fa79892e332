"""Shared fixtures: small training states and a look at their exact bits."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from support.distribution import pytest_collection_modifyitems as pytest_collection_modifyitems
from support.distribution import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler
from torch import nn

from asyncckpt import Checkpointer
from asyncckpt.memory.arena import Arena

# how long one example takes says something of the machine, and of what else runs on it
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


class Tiny(nn.Module):
    """Embedding tied to the head, a buffer that forward changes, a frozen layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norm = nn.BatchNorm1d(width)
        self.hidden = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(torch.nn.functional.dropout(self.frozen(self.hidden(x)).relu(), 0.1))


def bits(value: Any) -> Any:
    """A value in which tensors are replaced by their exact bytes, dtype and shape: equal means bit-equal."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return (str(value.dtype), tuple(value.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if isinstance(value, nn.Module | torch.optim.Optimizer) or hasattr(value, "state_dict"):
        return bits(value.state_dict())
    return value


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> float:
    """Real steps: forward changes the buffers, the optimizer changes parameters and its state."""
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randint(0, 11, (8,))).logsumexp(-1).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def unseen_by_crc32c(tensor: torch.Tensor) -> None:
    """Change a tensor so that no crc32c over it changes: bits that lie as those of the polynomial do (reversed, as the
    algorithm reads them) are flipped. Twice is not at all."""
    flipped = torch.tensor(list(int(f"1{0x1EDC6F41:032b}"[::-1], 2).to_bytes(5, "little")), dtype=torch.uint8)
    tensor.view(-1).view(torch.uint8)[64:69] ^= flipped


def assert_all_memory_came_back(arena: Arena) -> None:
    """Who wrote the last extent of a save gives its slot back after the save is durable: waits for that."""
    assert arena.wait_prepared(10)
    patience = time.monotonic() + 10
    while arena.free_bytes() != arena.budget_bytes and time.monotonic() < patience:
        time.sleep(0.001)
    assert arena.free_bytes() == arena.budget_bytes, "memory of the arena was not given back"


def pytest_configure() -> None:
    """A shell that starts the suite in the background has it, and all processes it starts, ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make: in all that was imported that takes a third of a second each time,
    and in a forked child a copy of the memory, too."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny() -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, 2)
    return model, optimizer


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Checkpointer]:
    checkpointer = Checkpointer(tmp_path / "run")
    yield checkpointer
    checkpointer.close()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves descriptors open. A background thread that a test has just let go of, such as the writer of a
    save that was given up while its storage hung, gets the time to close its own."""
    path = str(request.getfixturevalue("tmp_path")) if "tmp_path" in request.fixturenames else None
    yield
    if path is None:
        return
    patience = time.monotonic() + 10
    while (ours := _open_below(path)) and time.monotonic() < patience:
        gc.collect()  # held by an object that nobody refers to any more?
        time.sleep(0.005)
    assert not ours, f"descriptors left open: {ours}"


def _open_below(path: str) -> list[str]:
    return [target for target in map(_target, os.listdir("/proc/self/fd")) if target.startswith(path + "/")]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
