"""A trainer saves when a callback or a signal asks for it, too: also a step that is saved already."""

from __future__ import annotations

import contextlib
import json
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from support.tiny_transformers import StopAt, bits, same, trained, trainer

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


@contextlib.contextmanager
def signals_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Asks(transformers.TrainerCallback):  # type: ignore[misc]
    """Asks for a save at the end of each epoch, beside those that ``save_steps`` asks for."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history.append({"ended": state.global_step, "step": state.global_step})
        control.should_save = True


@pytest.mark.parametrize("limit", [None, 2])
def test_a_step_that_is_saved_twice_is_there_as_it_was_saved_last(limit: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 14, "save_steps": 7, "save_total_limit": limit}
    unbroken = trained(tmp_path / "plain", transformers.Trainer, **options, callbacks=[Asks()])
    trained(tmp_path / "ours", **options, callbacks=[Asks(), StopAt(8)])
    state = json.loads(Run(tmp_path / "ours").assets(7)["trainer_state.json"])
    assert {"ended": 7, "step": 7} in state["log_history"]
    resumed = trained(tmp_path / "ours", **options, callbacks=[Asks()], resume=True)
    assert same(bits(resumed), bits(unbroken))
    run = Run(tmp_path / "ours")
    assert [entry.step for entry in run.ls()] == ([7, 8, 14] if limit is None else [8, 14])
    assert all(run.verify(entry.step) == [] for entry in run.ls())


class Terminated(transformers.TrainerCallback):  # type: ignore[misc]
    """Does what SIGTERM does some seconds later, at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.manager._enable_checkpoint()


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end"])
@pytest.mark.parametrize("step", [0, 4, 6])
def test_a_save_that_sigterm_asks_for_is_gone_on_from_to_the_bit(event: str, step: int, tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "plain", transformers.Trainer)
    asks = Terminated(event, step)
    with signals_as_they_were():
        stopped = trainer(str(tmp_path / "ours"), enable_jit_checkpoint=True, callbacks=[asks])
        (asks.manager,) = filter(None, (getattr(c, "jit_manager", None) for c in stopped.callback_handler.callbacks))
        stopped.train()
    if step or event != "on_step_end":  # no step ends as number 0
        assert stopped.state.global_step < 12
    assert {f.name for f in tmp_path.glob("ours/*/*incomplete*")} == set()
    run = Run(tmp_path / "ours")
    assert all(run.verify(entry.step) == [] for entry in run.ls())
    assert run.newest().step >= stopped.state.global_step - 1
    if stopped.state.global_step < 12:
        assert same(bits(trained(tmp_path / "ours", resume=True)), bits(unbroken))
