"""What may be copied while training goes on, and which optimizers wait for it."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.deferring import let_all_be_deferred
from support.examples import examples
from torch import nn

from asyncckpt import Checkpointer, InvalidOption
from asyncckpt.events import SaveStarted
from asyncckpt.stage import job as staging
from asyncckpt.stage.eager import OwnedMemory, divide
from asyncckpt.types import LocalTensor, TensorSpec

PATIENCE_SECONDS = 20.0


def large(n: int = 6) -> nn.Sequential:
    """Parameters that are too large to be cloned instead of deferred."""
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(n)))


def with_gradients(optimizer: torch.optim.Optimizer) -> Any:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
    return optimizer


@contextlib.contextmanager
def late_copies(monkeypatch: pytest.MonkeyPatch, run: Checkpointer) -> Iterator[threading.Event]:
    """The background copies nothing that is deferred before the event is set: whatever is changed before that is torn
    unless somebody waits."""
    original, go = staging.copy_segments, threading.Event()

    def copy(*args: Any) -> None:
        deferred = any(flight.job.checks and flight.job.checks.unsettled for flight in run._in_flight.all())
        if deferred and threading.current_thread().name.startswith("asyncckpt-stager"):
            assert go.wait(PATIENCE_SECONDS)
        original(*args)

    monkeypatch.setattr(staging, "copy_segments", copy)
    try:
        yield go
    finally:
        go.set()


def saved_as_it_was(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: Any,
    state: dict[str, Any],
    change: Callable[[], object],
) -> Checkpointer:
    """Save, change something, let the background copy: what is stored is what was there at ``save``."""
    run = let_all_be_deferred(Checkpointer(path))
    for one in watched if isinstance(watched, list) else [watched]:
        run.watch(one)
    with late_copies(monkeypatch, run) as go:
        model = state["model"]
        expected = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        pending = run.save(1, state)
        changing = threading.Thread(target=change)
        changing.start()
        changing.join(0.5)  # a change that waits does so until the background has copied
        go.set()
        changing.join()
        pending.result(PATIENCE_SECONDS)
    found = run.load_tensors(1, ["model"])
    torn = [name for name, tensor in expected.items() if not torch.equal(found[f"model.{name}"], tensor)]
    assert torn == []
    return run


def test_a_frozen_parameter_is_not_deferred_though_the_optimizer_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A momentum encoder changes it in its forward."""
    model = large()
    for layer in model[3:]:
        layer.requires_grad_(False)
    optimizer = with_gradients(torch.optim.SGD(model.parameters(), lr=0.1))

    @torch.no_grad()
    def forward() -> None:
        for layer, encoder in zip(model[:3], model[3:], strict=True):
            encoder.weight.lerp_(layer.weight, 0.5)

    saved_as_it_was(tmp_path / "run", monkeypatch, optimizer, {"model": model}, forward).close()


@pytest.mark.parametrize("dropped", [False, True], ids=["there", "dropped"])
def test_an_optimizer_made_anew_over_the_same_parameters_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    model = large()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    new = with_gradients(torch.optim.SGD(model.parameters(), lr=0.2))
    watched = [old]

    def step() -> None:
        if dropped:
            watched.clear()
            gc.collect()
        new.step()

    run = saved_as_it_was(tmp_path / "run", monkeypatch, watched, {"model": model}, step)
    run.close()


def test_a_second_optimizer_over_a_view_of_the_parameters_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large()
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    at = 0
    for layer in model:
        layer.weight.data = flat[at : at + layer.weight.numel()].view_as(layer.weight)
        at += layer.weight.numel()
    watched = torch.optim.SGD(model.parameters(), lr=0.1)
    other = with_gradients(torch.optim.SGD([nn.Parameter(flat)], lr=0.1))
    saved_as_it_was(tmp_path / "run", monkeypatch, watched, {"model": model}, other.step).close()


def test_an_optimizer_of_something_else_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one of a GAN, say."""
    model, other = large(), nn.Linear(2, 2)
    watched = with_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    unrelated = with_gradients(torch.optim.Adam(other.parameters()))
    unrelated.step()
    with Checkpointer(tmp_path / "run") as run, late_copies(monkeypatch, run) as go:
        let_all_be_deferred(run).watch(watched)
        pending = run.save(1, {"model": model})
        finished = threading.Event()
        copied = staging.StagingJob.finish

        def finish(*args: Any) -> None:
            finished.set()
            copied(*args)

        monkeypatch.setattr(staging.StagingJob, "finish", finish)
        unrelated.step()
        assert not finished.is_set()
        go.set()
        watched.step()
        pending.result(PATIENCE_SECONDS)


def test_an_optimizer_of_which_nobody_can_tell_where_its_memory_lies_waits(tmp_path: Path) -> None:
    """A sparse parameter has no storage; some optimizers cannot be hashed."""

    class Unhashable(torch.optim.SGD):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

    model = large()
    watched = with_gradients(Unhashable(model.parameters(), lr=0.1))
    sparse = nn.Parameter(torch.eye(3).to_sparse())
    sparse.grad = torch.eye(3).to_sparse()
    other = torch.optim.SGD([sparse], lr=0.1)
    with Checkpointer(tmp_path / "run") as run:
        let_all_be_deferred(run).watch(watched)
        for step in (1, 2):
            run.save(step, {"model": model})
            other.step()
            watched.step()


def test_of_several_optimizers_none_is_watched_where_one_is_refused(tmp_path: Path) -> None:
    model = large()
    good = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run") as run:
        with pytest.raises(InvalidOption):
            run.watch(good, _two_inside(model))
        assert not good._optimizer_load_state_dict_pre_hooks


def test_a_frozen_parameter_in_a_trained_ones_memory_is_not_deferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large()
    twin = large()
    for mine, other in zip(twin, model, strict=True):
        mine.weight = nn.Parameter(other.weight.data, requires_grad=False)
    optimizer = with_gradients(torch.optim.SGD(model.parameters(), lr=0.1))

    def forward() -> None:
        for layer in twin:
            layer.weight.data.zero_()

    saved_as_it_was(tmp_path / "run", monkeypatch, optimizer, {"model": model, "twin": twin}, forward).close()


class Wrapper(torch.optim.Optimizer):
    """Delegates, and never was initialised as an optimizer."""

    def __init__(self, *inside: Any) -> None:
        for number, one in enumerate(inside):
            setattr(self, f"inside{number}", one)

    param_groups = property(lambda self: self.inside0.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.inside0.state)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return self.inside0.state_dict()  # type: ignore[no-any-return]

    def step(self, closure: Any = None) -> Any:
        return self.inside0.step(closure)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_is_followed_to_the_optimizer_that_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    model = large()
    optimizer: Any = with_gradients(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for _ in range(depth):
        optimizer = Wrapper(optimizer)
    state = {"model": model, "optimizer": optimizer}
    saved_as_it_was(tmp_path / "run", monkeypatch, optimizer, state, optimizer.step).close()


def _two_inside(model: nn.Module) -> Any:
    return Wrapper(*(torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)))


def _nothing_inside(_: nn.Module) -> Any:
    return Wrapper(object())


def _itself_inside(_: nn.Module) -> Any:
    found = Wrapper()
    found.inside0 = found
    return found


def _a_part_inside(model: nn.Module) -> Any:
    class More(Wrapper):
        param_groups = property(lambda _: [{"params": list(model.parameters())}])  # type: ignore[assignment]

    return More(torch.optim.SGD([next(model.parameters())], lr=0.1))


@pytest.mark.parametrize("make", [_two_inside, _nothing_inside, _itself_inside, _a_part_inside])
def test_a_wrapper_that_cannot_be_followed_is_refused_whole(tmp_path: Path, make: Callable[[nn.Module], Any]) -> None:
    model = large()
    wrapper = make(model)
    started: list[SaveStarted] = []
    with Checkpointer(tmp_path / "run", on_event=lambda event: _kept(event, started)) as run:
        for _ in range(2):
            with pytest.raises(InvalidOption, match="Pass the optimizer that steps"):
                run.watch(wrapper)
        run.save(1, {"model": model}).result(PATIENCE_SECONDS)
    assert [event.deferred for event in started] == [False]


def _kept(event: object, started: list[SaveStarted]) -> None:
    if isinstance(event, SaveStarted):
        started.append(event)


def test_buffers_in_the_parameters_memory_block_are_copied_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 19
    flat = torch.zeros(8 * size)
    model = nn.Module()
    for n in range(4):
        model.register_parameter(f"w{n}", nn.Parameter(flat[n * size : (n + 1) * size]))
        model.register_buffer(f"mean{n}", flat[(4 + n) * size : (5 + n) * size])
    optimizer = with_gradients(torch.optim.SGD(model.parameters(), lr=0.1))

    def forward() -> None:
        flat[4 * size :].add_(1)

    saved_as_it_was(tmp_path / "run", monkeypatch, optimizer, {"model": model}, forward).close()


def test_parameters_in_one_memory_block_are_deferred_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large()
    flat = torch.zeros(6 << 20)
    for n, layer in enumerate(model):
        layer.weight.data = flat[n << 20 : (n + 1) << 20].view(1024, 1024)
    optimizer = with_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    with Checkpointer(tmp_path / "run") as run, late_copies(monkeypatch, run) as go:
        let_all_be_deferred(run).watch(optimizer)
        pending = run.save(1, {"model": model})
        assert not pending.staged(0.05), "nothing was left for the background"
        go.set()
        pending.result(PATIENCE_SECONDS)


@examples(200)
@given(data=st.data())
def test_what_is_deferred_is_owned_to_the_byte_and_alone_with_what_is_owned(data: st.DataObject) -> None:
    """Compared with sets of single bytes."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    blocks = [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    def views(least: int) -> list[torch.Tensor]:
        found = []
        for _ in range(data.draw(st.integers(least, 5))):
            block = data.draw(st.sampled_from(blocks))
            begin = data.draw(st.integers(0, block.numel()))
            end = data.draw(st.integers(begin, block.numel()))
            found.append(block[begin : end : data.draw(st.integers(1, 3))])
        return found

    def span(tensor: torch.Tensor) -> set[int]:
        begin = tensor.data_ptr()
        return set(range(begin, begin + (tensor.numel() - 1) * tensor.stride(0) + 1)) if tensor.numel() else set()

    owned, tensors = views(0), views(1)
    memory = OwnedMemory()
    memory.add(owned)
    pieces = [LocalTensor(TensorSpec(str(n), "U8", tuple(t.shape), 2 << 20), t) for n, t in enumerate(tensors)]
    division = divide(pieces, memory)
    # a parameter that leaves gaps does not own what lies in them
    bytes_owned = (
        set().union(*(span(one) for one in owned if one.numel() < 2 or one.stride(0) == 1)) if owned else set()
    )
    inside = {n: span(tensor) <= bytes_owned for n, tensor in enumerate(tensors)}
    block_of = {n: t.untyped_storage().data_ptr() for n, t in enumerate(tensors)}
    for n, tensor in enumerate(tensors):
        alone = all(inside[m] for m in inside if block_of[m] == block_of[n])
        if n not in division.eager:
            assert inside[n]
            assert alone or not tensor.numel()
        elif tensor.numel():
            assert not alone, "it could have been deferred"
