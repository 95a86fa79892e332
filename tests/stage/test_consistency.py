"""The checkpoint is the state at ``save()``, whatever training does legally afterwards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, bits, train
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from support.deferring import let_all_be_deferred
from support.examples import examples
from torch import nn

from asyncckpt import ChangedWhileCopied, Checkpointer, RngState, Safetensors, StagingOptions, WriterOptions
from asyncckpt.events import Event, SaveStarted, Stalled
from asyncckpt.testing import GatedOps, SlowOps


def _slow(run: Checkpointer) -> Checkpointer:
    run._store.ops = SlowOps(0.002)
    return run


class World:
    """A training loop in which everything that may change does."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = Tiny(64)
        self.late = nn.Linear(64, 3000)  # with its state more than the smallest arena holds
        owned = [p for p in self.model.parameters() if p.requires_grad]
        self.watched = torch.optim.AdamW([*owned, *self.late.parameters()], lr=1e-2)
        self.free = nn.Linear(300, 300)
        self.unwatched = torch.optim.SGD(self.free.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.watched, 1)
        self.ema = {"late": torch.zeros(3000, 64)}
        self.loader = {"position": 0, "order": list(range(5))}
        self.state = {
            "model": self.model,
            "late": self.late,
            "optimizer": self.watched,
            "free": self.free,
            "unwatched": self.unwatched,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "loader": self.loader,
            "rng": RngState(),
        }
        self.update()
        self.update_unwatched()

    def update(self) -> None:
        self.backward()
        self.watched.step()

    def backward(self) -> None:
        self.watched.zero_grad()
        (
            self.model(torch.randint(0, 11, (8,))).square().mean() + self.late(torch.randn(2, 64)).square().mean()
        ).backward()

    def forward_only(self) -> None:  # changes the batch norm's buffers and the RNG
        with torch.no_grad():
            self.model(torch.randint(0, 11, (8,)))

    def change_frozen(self) -> None:  # owned by no optimizer: copied before save returned
        with torch.no_grad():
            self.model.frozen.weight.add_(1.0)

    def update_unwatched(self) -> None:
        self.free(torch.randn(2, 300)).sum().backward()
        self.unwatched.step()

    def tick(self) -> None:
        self.scheduler.step()
        self.loader["position"] += 1
        self.loader["order"].append(9)
        self.ema["late"].lerp_(self.late.weight.detach(), 0.5)

    def swap_data(self) -> None:  # the old tensor stays what it was
        self.late.weight.data = self.late.weight.data + 1.0

    def load(self) -> None:
        self.watched.load_state_dict(self.watched.state_dict())


ACTIONS = ["update", "backward", "forward_only", "change_frozen", "update_unwatched", "tick", "swap_data", "load"]


@examples(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_legal_change_at_every_legal_moment_leaves_the_checkpoint_alone(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = World()
    path = tmp_path_factory.mktemp("run") / "run"
    deferred = data.draw(st.booleans(), "deferred")
    staging = data.draw(st.sampled_from([None, 1 << 20]), "staging_bytes")
    with Checkpointer(
        path, files=Safetensors(extent_bytes=64 << 10), staging=StagingOptions(budget_bytes=staging)
    ) as run:
        _slow(run)
        if deferred:
            run.watch(world.watched)
        if deferred and data.draw(st.booleans(), "earned"):
            let_all_be_deferred(run)
        expected: dict[int, Any] = {}
        for step in range(1, data.draw(st.integers(1, 3), "saves") + 1):
            rng = torch.get_rng_state()
            expected[step] = {key: bits(value) for key, value in world.state.items() if key != "rng"}
            expected[step]["rng"] = bits(rng)
            run.save(step, world.state)
            for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=5), "actions"):
                getattr(world, action)()
                if data.draw(st.booleans(), "pause"):
                    time.sleep(0.003)
        run.wait()
        for step, snapshot in expected.items():
            fresh = World()
            run.restore(fresh.state, step)
            assert {key: bits(value) for key, value in fresh.state.items() if key != "rng"} | {
                "rng": bits(torch.get_rng_state())
            } == snapshot


def test_without_the_hook_an_update_spoils_the_save_and_somebody_is_told(tmp_path: Path) -> None:
    """Shows that the property above can fail at all: the same loop with the hook taken off would be torn."""
    world = World()
    with Checkpointer(
        tmp_path / "run", files=Safetensors(extent_bytes=64 << 10), staging=StagingOptions(budget_bytes=1 << 20)
    ) as run:
        ops = run._store.ops = GatedOps()
        let_all_be_deferred(run).watch(world.watched)
        run._watched._handles.pop(0).remove()
        pending = run.save(1, {"late": world.late, "optimizer": world.watched, "model": world.model})
        world.update()
        ops.gate.set()
        assert isinstance(pending.exception(), ChangedWhileCopied)


def test_a_deferred_save_returns_before_the_copy_and_the_update_waits_for_it(tmp_path: Path) -> None:
    events: list[Event] = []
    model = nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run", on_event=events.append, staging=StagingOptions(budget_bytes=1 << 20)) as run:
        _slow(run)
        let_all_be_deferred(run).watch(optimizer)
        pending = run.save(1, {"model": model, "optimizer": optimizer})
        assert not pending.staged(0), "4 MB cannot be staged through 1 MiB before the disk took some"
        model(torch.ones(1, 1000)).sum().backward()
        optimizer.step()
        assert pending.staged(0), "the update must have waited"
        pending.result()
    waits = [event for event in events if isinstance(event, Stalled)]
    assert [event.where for event in waits] == ["save", "optimizer.step"]
    assert pending.result().stall_seconds == pytest.approx(sum(event.seconds for event in waits))
    assert [event.deferred for event in events if isinstance(event, SaveStarted)] == [True]


def test_guard_covers_changes_outside_the_optimizer(tmp_path: Path) -> None:
    model = nn.Linear(600, 600)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run", staging=StagingOptions(budget_bytes=1 << 20)) as run:
        _slow(run)
        let_all_be_deferred(run).watch(optimizer)
        before = bits(model)
        run.save(1, {"model": model, "optimizer": optimizer})
        with run.guard(), torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.001, 0.001)
        run.wait()
        run.restore({"model": model})
        assert bits(model) == before


def test_hung_storage_does_not_hang_training(tmp_path: Path) -> None:
    model = nn.Linear(600, 600)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer, staging = (
        WriterOptions(durable_timeout_seconds=0.5),
        StagingOptions(budget_bytes=1 << 20, stall_timeout_seconds=0.3),
    )
    run = Checkpointer(tmp_path / "run", staging=staging, writer=writer)
    hung = GatedOps()
    try:
        let_all_be_deferred(run).watch(optimizer)
        state = {"model": model, "optimizer": optimizer}
        run.save(1, state).result()
        run.wait()  # the hint of the first is written after its acknowledgement
        run._store.ops = hung
        train_step(model, optimizer)  # or there would be nothing to write
        pending = run.save(2, state)
        began = time.monotonic()
        train_step(model, optimizer)
        assert time.monotonic() - began < 5, "the update waited for dead storage"
        with pytest.raises(TimeoutError, match="step 2"):
            pending.result(10)
        train_step(model, optimizer)
    finally:
        hung.gate.set()
        run.close()
    assert [entry.step for entry in run.ls()] == [1]
    assert run.verify(1) == []


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 600)).sum().backward()
    optimizer.step()


def test_gradient_scaler_may_skip_the_update(tmp_path: Path, tiny: Any) -> None:
    model, optimizer = tiny
    with Checkpointer(tmp_path / "run") as run:
        run.watch(optimizer)
        for step in range(1, 4):
            before = bits(model)
            run.save(step, {"model": model, "optimizer": optimizer})
            if step != 2:  # a skipped step: no hook fires, and nothing changes
                train(model, optimizer)
            run.wait()
            fresh = Tiny()
            run.restore({"model": fresh}, step)
            assert bits(fresh) == before
