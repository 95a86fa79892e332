"""Further checks that planted bugs have to be caught by, as those in ``mutant_checks``: of what is copied when."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.deferring import let_all_be_deferred
from support.queued_copies import Stream, a_save_after_one_that_failed, ones_and_twos

from asyncckpt import ChangedWhileCopied, Checkpointer, SaveFailed, WriterOptions
from asyncckpt.errors import AsyncCkptError
from asyncckpt.stage import job as staging
from asyncckpt.stage.eager import OwnedMemory, divide
from asyncckpt.types import LocalTensor, TensorSpec


def copies_of_a_failed_save_land_on_nothing(root: Path) -> None:
    a_save_after_one_that_failed(root / "run", [Stream(), Stream()], ones_and_twos())


def nor_on_what_the_host_writes(root: Path) -> None:
    large = {"a": torch.full((300_000,), 1.0)}
    small = {f"t{n:03}": torch.full((30,), float(n)) for n in range(200)}
    stream = Stream()
    a_save_after_one_that_failed(root / "run", [stream, stream], [large, small])


def _deferred(root: Path, change: Callable[[torch.nn.Sequential], object], watch: Any, *, late: bool = True) -> None:
    """Whatever is changed after ``save`` and before the background has copied, what is stored is as it was."""
    model = torch.nn.Sequential(*(torch.nn.Linear(700, 700, bias=False) for _ in range(4)))
    model[3].requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    go, original = threading.Event(), staging.copy_segments

    def copy(*args: Any) -> None:
        if threading.current_thread().name.startswith("asyncckpt-stager"):
            go.wait(10)
        original(*args)

    with pytest.MonkeyPatch.context() as patch, Checkpointer(root / "run") as run:
        patch.setattr(staging, "copy_segments", copy)
        let_all_be_deferred(run).watch(watch(model))
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        pending = run.save(1, {"model": model})
        changing = threading.Thread(target=change, args=(model,))
        changing.start()
        changing.join(0.5)
        go.set()
        changing.join()
        pending.result(30)
        found = run.load_tensors(1)
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in expected.items()), "torn"


def _trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    kept.append(torch.optim.SGD(model.parameters(), lr=0.1))
    return kept[-1]


#: Optimizers that something else keeps alive: a scheduler, say.
kept: list[torch.optim.Optimizer] = []


def an_optimizer_made_anew_waits(root: Path) -> None:
    _deferred(root, lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(), _trained)


def frozen_parameters_are_not_deferred(root: Path) -> None:
    _deferred(root, lambda model: model[3].weight.data.zero_(), _trained)


def buffers_beside_parameters_are_not_deferred(root: Path) -> None:
    flat = torch.zeros(2, 1 << 19)
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(flat[0]))
    model.register_buffer("mean", flat[1])
    memory = OwnedMemory()
    memory.add([model.w])
    pieces = [LocalTensor(TensorSpec(name, "F32", (1 << 19,), 2 << 20), t) for name, t in model.state_dict().items()]
    assert divide(pieces, memory).eager == {0, 1}, (
        "a buffer in the parameters' memory is copied while forward changes it"
    )


def a_save_that_cannot_be_copied_ends_at_once(root: Path) -> None:
    model = torch.nn.Linear(1000, 1000)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        run = Checkpointer(root / "run", writer=WriterOptions(durable_timeout_seconds=8))
        let_all_be_deferred(run).watch(_trained(model))
        patch.setattr(staging, "copy_segments", fails)
        began = time.monotonic()
        error = run.save(1, {"model": model}).exception(20)
        with contextlib.suppress(AsyncCkptError):
            run.close()
    assert isinstance(error, SaveFailed)
    assert time.monotonic() - began < 5, "nobody was told before the deadline"


def _loop_of_two_saves(root: Path, changes: list[Callable[[torch.nn.Module], object]]) -> list[BaseException | None]:
    """Save, change something before the background has copied, update; return how each save ended. What is published is
    as it was."""
    model = torch.nn.Linear(1500, 1000, bias=False)
    optimizer = _trained(model)
    go, original = threading.Event(), staging.StagingJob._stage

    def stage(*args: Any) -> None:
        if threading.current_thread().name.startswith("asyncckpt-stager"):
            go.wait(0.3)
        original(*args)

    ends: list[BaseException | None] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(AsyncCkptError), Checkpointer(root / "run") as run:
        patch.setattr(staging.StagingJob, "_stage", stage)
        run.watch(optimizer)
        for step, change in enumerate(changes, 1):
            expected = model.weight.detach().clone()
            go.clear()
            pending = run.save(step, {"model": model})
            change(model)
            go.set()
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            ends.append(pending.exception(30))
            if ends[-1] is None:
                run.wait()
                assert torch.equal(run.load_tensors(step)["model.weight"], expected), "torn"
    return ends


def _nothing(_: torch.nn.Module) -> None:
    pass


@torch.no_grad()
def _one_item(model: Any) -> None:
    model.weight[200, 700] += 1


def _all_behind_torchs_back(model: Any) -> None:
    model.weight.data.zero_()


def nothing_is_deferred_before_it_was_shown_to_stay(root: Path) -> None:
    assert _loop_of_two_saves(root, [_all_behind_torchs_back] * 2) == [None, None], "a save was lost"


def one_changed_item_of_what_is_deferred_is_told(root: Path) -> None:
    ends = _loop_of_two_saves(root, [_nothing, _one_item, _one_item])
    assert isinstance(ends[1], ChangedWhileCopied)
    assert ends[2] is None, "it was deferred again"


def a_change_that_torch_does_not_count_is_told(root: Path) -> None:
    ends = _loop_of_two_saves(root, [_nothing, _all_behind_torchs_back, _all_behind_torchs_back])
    assert isinstance(ends[1], ChangedWhileCopied)
    assert ends[2] is None, "it was deferred again"
