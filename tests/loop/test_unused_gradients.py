"""A save between backward and the optimizer's step loses gradients: that is told, once, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from asyncckpt import Checkpointer

TOLD = "after backward and before the step"


class Loop:
    """A training loop over one small model, with a watched optimizer."""

    def __init__(self, run: Checkpointer, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        self.run = run
        self.model = nn.Linear(3, 3)
        self.optimizer = kind(self.model.parameters())
        run.watch(self.optimizer)
        self.saved = 0

    def backward(self) -> torch.Tensor:
        loss = self.model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    def save(self) -> None:
        self.saved += 1
        self.run.save(self.saved, {"model": self.model, "optimizer": self.optimizer}).result()


@pytest.fixture
def loop(tmp_path: Path) -> Any:
    with Checkpointer(tmp_path / "run") as run:
        yield Loop(run)


def test_a_save_in_the_middle_of_an_accumulation_is_told_once(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    for micro in range(12):
        loop.backward()
        if micro % 4 == 3:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        if micro % 6 == 5:  # once in the middle of four
            loop.save()
    assert caplog.text.count(TOLD) == 1
    assert "step 1 is saved" in caplog.text
    assert "AdamW" in caplog.text


def _zero_first(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loop.backward()
    loop.optimizer.step()


def _zero_last(loop: Loop) -> None:
    loop.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def _zero_in_place(loop: Loop) -> None:
    loop.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none=False)


def _never_zeroed(loop: Loop) -> None:
    loop.backward()
    loop.optimizer.step()


def _clipped(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loop.backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
    loop.optimizer.step()


def _by_closure(loop: Loop) -> None:
    def closure() -> torch.Tensor:
        loop.optimizer.zero_grad()
        return loop.backward()

    loop.optimizer.step(closure)  # type: ignore[arg-type]


def _accumulated(loop: Loop) -> None:
    for _ in range(4):
        loop.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


@pytest.mark.parametrize(
    "step", [_zero_first, _zero_last, _zero_in_place, _never_zeroed, _clipped, _by_closure, _accumulated]
)
def test_saves_after_the_step_are_not(
    loop: Loop, step: Callable[[Loop], None], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        step(loop)
        loop.save()
    assert TOLD not in caplog.text


def test_a_save_before_the_first_step_is_not(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop.save()
    loop.backward()
    loop.save()
    assert TOLD not in caplog.text


def test_no_hook_is_left(tmp_path: Path) -> None:
    before = len(_global_optimizer_post_hooks)
    with Checkpointer(tmp_path / "run") as run:
        loop = Loop(run)
        _zero_last(loop)
        loop.save()
        assert len(_global_optimizer_post_hooks) == before + 1
    assert len(_global_optimizer_post_hooks) == before
