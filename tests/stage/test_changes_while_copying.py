"""What is changed between ``save`` and the update is never published under the step before: either the tensor was
copied before ``save`` returned, or the save fails and names it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.deferring import let_all_be_deferred, with_momentum
from torch import nn

from asyncckpt import ChangedWhileCopied, Checkpointer, Safetensors
from asyncckpt.events import CopiedEagerly, Event, SaveStarted
from asyncckpt.stage import job as staging

PATIENCE_SECONDS = 20.0
WIDTH = 600


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


class Loop:
    """A loop of a few MB, with gradients. ``change`` is made between each save and the update."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.model, self.optimizer = with_momentum(WIDTH, 3)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.events: list[Event] = []
        self.run = Checkpointer(path, on_event=self.events.append, **options)
        self.run.watch(self.optimizer)
        self.weight = self.model[1].weight
        self.go = threading.Event()
        self.go.set()
        original = staging.StagingJob._stage

        def stage(job: staging.StagingJob, *args: Any) -> None:
            if threading.current_thread().name.startswith("asyncckpt-stager") and self._defers():
                assert self.go.wait(PATIENCE_SECONDS)
            original(job, *args)

        monkeypatch.setattr(staging.StagingJob, "_stage", stage)

    def _defers(self) -> bool:
        return any(flight.job.checks and flight.job.checks.unsettled for flight in self.run._in_flight.all())

    def values(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found[f"optimizer.state.{number}.weight.momentum_buffer"] = state["momentum_buffer"].clone()
        return found

    def save(self, step: int, change: Callable[[Loop], object]) -> BaseException | None:
        """Save, change before anything deferred is copied, update; return how the save ended. What is published is as
        it was."""
        expected = self.values()
        self.go.clear()
        pending = self.run.save(step, self.state)
        changing = threading.Thread(target=change, args=(self,))
        changing.start()
        changing.join(0.2)  # a change that waits does so until the background has copied
        self.go.set()
        changing.join()
        self.optimizer.step()
        error = pending.exception(PATIENCE_SECONDS)
        self.run.wait()
        if error is None:
            found = self.run.load_tensors(step)
            torn = [name for name, tensor in expected.items() if not _same_bits(found[name], tensor)]
            assert torn == []
        return error

    def deferred(self) -> list[bool]:
        return [event.deferred for event in self.events if isinstance(event, SaveStarted)]

    def said(self) -> list[tuple[str, ...]]:
        return [event.tensors for event in self.events if isinstance(event, CopiedEagerly)]


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    made = Loop(tmp_path / "run", monkeypatch)
    yield made
    made.go.set()
    made.run.close()


def nothing(_: Loop) -> None:
    pass


@torch.no_grad()
def in_place(loop: Loop) -> None:
    loop.weight.clamp_(-0.001, 0.001)


def through_data(loop: Loop) -> None:
    loop.weight.data.clamp_(-0.001, 0.001)


@torch.no_grad()
def foreach(loop: Loop) -> None:
    torch._foreach_mul_([loop.weight], 0.5)


def numpy_view(loop: Loop) -> None:
    loop.weight.detach().numpy()[:] *= 0.5


@torch.no_grad()
def average(loop: Loop) -> None:
    loop.weight.data.lerp_(torch.zeros_like(loop.weight), 0.1)


@torch.no_grad()
def ascent_and_back(loop: Loop) -> None:
    """Sharpness-aware minimisation comes back to where it was."""
    before = loop.weight.clone()
    loop.weight.add_(1.0)
    loop.go.set()
    staged = loop.run._in_flight.all()
    for flight in staged:
        flight.job.wait(PATIENCE_SECONDS)
    loop.weight.copy_(before)


def swap_and_back_through_data(loop: Loop) -> None:
    """An average is swapped in for an evaluation, while the background copies."""
    before = loop.weight.detach().clone()
    loop.weight.data.zero_()
    loop.go.set()
    for flight in loop.run._in_flight.all():
        flight.job.wait(PATIENCE_SECONDS)
    loop.weight.data.copy_(before)


def load(loop: Loop) -> None:
    loop.model.load_state_dict({name: torch.zeros_like(t) for name, t in loop.model.state_dict().items()})


@torch.no_grad()
def momentum(loop: Loop) -> None:
    loop.optimizer.state[loop.weight]["momentum_buffer"].zero_()


def shrink_storage(loop: Loop) -> None:
    loop.weight.data.untyped_storage().resize_(0)
    loop.go.set()
    for flight in loop.run._in_flight.all():
        flight.job.wait(PATIENCE_SECONDS)
    loop.weight.data.untyped_storage().resize_(WIDTH * WIDTH * 4)


ILLEGAL = [in_place, through_data, foreach, numpy_view, average, ascent_and_back, load, momentum]


def other_memory(loop: Loop) -> None:
    loop.weight.data = loop.weight.data + 1.0


def other_storage(loop: Loop) -> None:
    loop.weight.data.set_(torch.ones(WIDTH, WIDTH))


@torch.no_grad()
def guarded(loop: Loop) -> None:
    with loop.run.guard():
        loop.weight.mul_(0.5)


def optimizer_loads(loop: Loop) -> None:
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())


def optimizer_made_anew(loop: Loop) -> None:
    torch.optim.SGD(loop.model.parameters(), lr=0.5).step()


@torch.no_grad()
def after_it_was_copied(loop: Loop) -> None:
    loop.go.set()
    for flight in loop.run._in_flight.all():
        assert flight.pending.staged(PATIENCE_SECONDS)
    loop.weight.mul_(0.5)


LEGAL = [nothing, other_memory, other_storage, guarded, optimizer_loads, optimizer_made_anew, after_it_was_copied]


@pytest.mark.parametrize("change", [*ILLEGAL, *LEGAL], ids=lambda change: change.__name__)
def test_before_a_step_has_shown_anything_all_is_copied_at_once(loop: Loop, change: Callable[[Loop], object]) -> None:
    for step in (1, 2):
        if loop.save(step, change) is not None:  # the change may be one that is not there at the first
            assert step == 2
    assert loop.deferred()[0] is False


@pytest.mark.parametrize(
    "change", [*ILLEGAL, swap_and_back_through_data, shrink_storage], ids=lambda change: change.__name__
)
def test_a_change_of_what_is_deferred_fails_the_save_and_is_not_torn_again(
    loop: Loop, change: Callable[[Loop], object]
) -> None:
    assert loop.save(1, nothing) is None
    error = loop.save(2, change)
    assert loop.deferred() == [False, True]
    assert isinstance(error, ChangedWhileCopied)
    assert "1.weight" in str(error) or change is load
    assert "guard()" in str(error)
    assert loop.save(3, change) is None, "it was not copied at once"
    assert loop.save(4, nothing) is None
    names = [name for names in loop.said() for name in names]
    assert len(names) == len(set(names)) >= 1


@pytest.mark.parametrize("change", LEGAL, ids=lambda change: change.__name__)
def test_a_legal_change_of_what_is_deferred_costs_nothing(loop: Loop, change: Callable[[Loop], object]) -> None:
    assert loop.save(1, nothing) is None
    for step in (2, 3):
        assert loop.save(step, change) is None
    assert loop.deferred()[:2] == [False, True]


def test_what_is_changed_at_every_step_is_never_deferred_and_that_is_said_once(loop: Loop) -> None:
    for step in range(1, 5):
        assert loop.save(step, through_data) is None
    assert loop.said() == [("model.1.weight",)]
    assert loop.deferred() == [False, True, True, True], "the others have earned it"


def test_state_that_an_optimizer_makes_late_earns_it_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path / "run", monkeypatch)
    loop.optimizer.state.clear()
    for step in (1, 2, 3):
        assert loop.save(step, nothing) is None
    earned = loop.run._starter._deferral._trusted
    assert {f"{component}.{spec.name}" for component, spec in earned} == set(loop.values())
    loop.run.close()


def test_an_optimizer_that_steps_inside_backward_waits_for_its_own_bytes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    run = let_all_be_deferred(Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=1 << 20)))
    run.watch(*optimizers.values())
    expected = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(run._starter.stager, "submit", lambda job: None)  # nothing is copied in the background
        pending = run.save(1, {"model": model})
    last = next(reversed(optimizers))
    last.grad = torch.ones_like(last)
    optimizers[last].step()
    (flight,) = run._in_flight.all()
    assert not flight.job.done, "it copied more than it changes"
    for parameter, optimizer in optimizers.items():
        if parameter is not last:
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    pending.result(PATIENCE_SECONDS)
    found = run.load_tensors(1)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    run.close()
