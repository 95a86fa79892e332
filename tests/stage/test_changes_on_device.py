"""On a GPU, too, nothing of a later moment is published, and a step that a CUDA graph replays is no step that waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.deferring import with_momentum

from asyncckpt import ChangedWhileCopied, Checkpointer, InvalidOption, Safetensors, StagingOptions
from asyncckpt.errors import AsyncCkptError
from asyncckpt.events import CopiedEagerly, Event, SaveStarted
from asyncckpt.stage.live_bytes import device_checksum

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CODECS = ["none", "planes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(1,), (7,), (1024,), (3, 1025), (64, 2048)])
def test_a_checksum_sees_every_changed_item_and_every_exchange(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    before = device_checksum(tensor).tolist()
    assert device_checksum(tensor.clone()).tolist() == before
    flat = tensor.view(-1)
    for index in {0, len(flat) // 2, len(flat) - 1}:
        flat[index] = 1 - flat[index].to(torch.int32)
        assert device_checksum(tensor).tolist() != before
        flat[index] = 1 - flat[index].to(torch.int32)
    assert device_checksum(tensor).tolist() == before
    if len(flat) > 1:
        exchanged = flat.flip(0)
        assert torch.equal(exchanged, flat) or device_checksum(exchanged.contiguous()).tolist() != before


def test_a_checksum_takes_dense_tensors_in_any_order_of_memory() -> None:
    images = torch.randn(4, 8, 6, 5).to(memory_format=torch.channels_last)
    before = device_checksum(images).tolist()
    images[3, 7, 5, 4] += 1
    assert device_checksum(images).tolist() != before


class GpuLoop:
    """A loop of 32 MB on a GPU."""

    def __init__(self, path: Path, codec: Any = "none") -> None:
        self.model, self.optimizer = with_momentum(1024, 4, "cuda")
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.events: list[Event] = []
        # the staging memory holds a quarter of the state: most of it is copied late
        self.run = Checkpointer(
            path,
            on_event=self.events.append,
            files=Safetensors(codec=codec, extent_bytes=1 << 20),
            staging=StagingOptions(budget_bytes=8 << 20),
        )
        self.run.watch(self.optimizer)
        self.weight = self.model[3].weight

    def save(self, step: int, change: Callable[[GpuLoop], object], update: Callable[[], object]) -> Any:
        expected = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        pending = self.run.save(step, self.state)
        change(self)
        update()
        error = pending.exception(60)
        with contextlib.suppress(AsyncCkptError):
            self.run.wait()
        if error is None:
            found = self.run.load_tensors(step, ["model"])
            torn = [name for name, t in expected.items() if not torch.equal(found[f"model.{name}"], t.cpu())]
            assert torn == []
            assert self.run.verify(step) == []
        return error

    def deferred(self) -> list[bool]:
        return [event.deferred for event in self.events if isinstance(event, SaveStarted)]


def nothing(_: GpuLoop) -> None:
    pass


@torch.no_grad()
def in_place(loop: GpuLoop) -> None:
    loop.weight.mul_(0.5)


def through_data(loop: GpuLoop) -> None:
    for parameter in loop.model.parameters():
        parameter.data.mul_(0.5)


@torch.no_grad()
def ascent_and_back(loop: GpuLoop) -> None:
    before = loop.weight.clone()
    loop.weight.add_(1.0)
    loop.weight.copy_(before)


@torch.no_grad()
def guarded(loop: GpuLoop) -> None:
    with loop.run.guard():
        loop.weight.mul_(0.5)


@torch.no_grad()
def after_it_was_staged(loop: GpuLoop) -> None:
    for flight in loop.run._in_flight.all():
        assert flight.pending.staged(60)
    loop.weight.mul_(0.5)


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("codec", CODECS)
def test_a_loop_that_changes_nothing_earns_it_at_once(tmp_path: Path, codec: str) -> None:
    loop = GpuLoop(tmp_path / "run", codec)
    for step in range(1, 5):
        assert loop.save(step, nothing, loop.optimizer.step) is None
    assert loop.deferred() == [False, True, True, True]
    loop.run.close()


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("change", [in_place, through_data, ascent_and_back], ids=lambda change: change.__name__)
def test_what_changes_at_every_step_is_never_deferred(tmp_path: Path, change: Callable[[GpuLoop], object]) -> None:
    loop = GpuLoop(tmp_path / "run")
    for step in range(1, 5):
        assert loop.save(step, change, loop.optimizer.step) is None
    said = [name for event in loop.events if isinstance(event, CopiedEagerly) for name in event.tensors]
    assert "model.3.weight" in said
    assert len(said) == len(set(said))
    loop.run.close()


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("change", [in_place, through_data, ascent_and_back], ids=lambda change: change.__name__)
def test_a_change_of_what_is_deferred_fails_the_save_or_came_after_the_copy(
    tmp_path: Path, change: Callable[[GpuLoop], object], codec: str
) -> None:
    loop = GpuLoop(tmp_path / "run", codec)
    assert loop.save(1, nothing, loop.optimizer.step) is None
    error = loop.save(2, change, loop.optimizer.step)
    assert error is None or isinstance(error, ChangedWhileCopied)
    for step in (3, 4):
        assert isinstance(loop.save(step, change, loop.optimizer.step), ChangedWhileCopied | None)
    loop.run.close()


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("change", [nothing, guarded, after_it_was_staged], ids=lambda change: change.__name__)
def test_a_legal_change_costs_nothing(tmp_path: Path, change: Callable[[GpuLoop], object]) -> None:
    loop = GpuLoop(tmp_path / "run")
    assert loop.save(1, nothing, loop.optimizer.step) is None
    for step in (2, 3, 4):
        assert loop.save(step, change, loop.optimizer.step) is None
    assert loop.deferred()[1]
    loop.run.close()


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("earned", [False, True])
@pytest.mark.parametrize("kind", ["adam", "adam, fused", "sgd"])
def test_an_optimizer_whose_step_is_captured_in_a_graph_is_never_deferred(
    tmp_path: Path, earned: bool, kind: str
) -> None:
    loop = GpuLoop(tmp_path / "run")
    loop.run.close()
    model = loop.model
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if kind != "sgd":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True, fused="fused" in kind)
    loop.optimizer, loop.state = optimizer, {"model": model, "optimizer": optimizer}
    loop.run = Checkpointer(
        tmp_path / "captured", on_event=loop.events.append, staging=StagingOptions(budget_bytes=8 << 20)
    )
    loop.run.watch(optimizer)
    loop.events.clear()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    if earned:
        for step in (1, 2):
            assert loop.save(step, nothing, optimizer.step) is None
        # Adam says that a graph may replay its step; of SGD that is known once it was captured
        assert loop.deferred() == [False, kind == "sgd"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(InvalidOption, match="captured"):
            loop.run.save(9, loop.state)
        optimizer.step()
    loop.events.clear()
    for step in range(10, 14):
        assert loop.save(step, nothing, graph.replay) is None
    assert not any(loop.deferred())
    loop.run.close()


@pytest.mark.cuda
@on_gpu
def test_a_save_that_is_not_copied_when_a_graph_is_captured_fails_and_the_capture_does_not(tmp_path: Path) -> None:
    loop = GpuLoop(tmp_path / "run")
    optimizer = loop.optimizer
    for step in (1, 2):
        assert loop.save(step, nothing, optimizer.step) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.run._starter.stager, "submit", lambda job: None)  # nothing is copied in the background
        pending = loop.run.save(3, loop.state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert isinstance(pending.exception(60), ChangedWhileCopied)
    graph.replay()
    torch.cuda.synchronize()
    assert loop.save(4, nothing, graph.replay) is None
    loop.run.close()
