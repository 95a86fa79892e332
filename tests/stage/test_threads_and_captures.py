"""Threads of ours make no context on another rank's GPU, and a CUDA graph that the trainer captures is left alone.

A stand-in takes the place of ``torch.cuda`` and knows the rules; at the end, the same on a GPU.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from support.deferring import let_all_be_deferred, with_momentum
from support.fake_cuda import DEVICE, PATIENCE_SECONDS, FakeCuda, fake_cuda
from support.queued_copies import until

from asyncckpt import Checkpointer, InvalidOption, RunOptions, WriterOptions
from asyncckpt.memory import cuda

__all__ = ["fake_cuda"]
PROCESSES = ["never", "always"]


class Loop:
    """A loop whose model and optimizer are deferred."""

    def __init__(self, path: Path, process: str = "never", device: str = "cpu") -> None:
        self.model, self.optimizer = with_momentum(64, 4, device)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        writer = WriterOptions(process=process, reuse_unchanged=False)  # type: ignore[arg-type]
        self.run = let_all_be_deferred(Checkpointer(path, writer=writer, run=RunOptions(overwrite=True)))
        self.run.watch(self.optimizer)


@pytest.mark.parametrize("process", PROCESSES)
def test_no_thread_makes_a_context_on_the_gpu_of_another_rank(
    tmp_path: Path, fake_cuda: FakeCuda, process: str
) -> None:
    loop = Loop(tmp_path / "run", process)
    fake_cuda.finished.clear()
    pending = loop.run.save(1, loop.state)
    assert until(lambda: any("Synchronize" in call for call, _ in fake_cuda.calls)), "nobody waits for the copies"
    fake_cuda.finished.set()
    pending.result(PATIENCE_SECONDS)
    loop.optimizer.step()
    assert loop.run.save(2, loop.state).staged(PATIENCE_SECONDS)
    loop.run.close()
    assert set(fake_cuda.contexts) == {DEVICE.index}, fake_cuda.contexts
    threads = fake_cuda.contexts[1]
    assert "asyncckpt-arena" in threads, "it pins memory"
    assert any(name.startswith("asyncckpt-writer" if process == "never" else "asyncckpt-hand") for name in threads)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_capture_and_a_save_in_flight_do_not_break_each_other(
    tmp_path: Path, fake_cuda: FakeCuda, process: str
) -> None:
    loop = Loop(tmp_path / "run", process)
    loop.run.prepare(loop.state)
    assert loop.run._arena.wait_prepared(PATIENCE_SECONDS)
    fake_cuda.finished.clear()
    pending = loop.run.save(1, loop.state)
    with fake_cuda.capture():
        assert until(lambda: any("Synchronize" in call for call, _ in fake_cuda.calls))
        fake_cuda.finished.set()
        assert pending.staged(PATIENCE_SECONDS)
        pending.result(PATIENCE_SECONDS)
    assert fake_cuda.broken == []
    assert loop.run.verify(1) == []
    loop.run.close()


def test_a_save_beside_the_capture_of_another_thread_breaks_nothing(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    loop = Loop(tmp_path / "run")
    capturing, ended = threading.Event(), threading.Event()

    def capture() -> None:
        with fake_cuda.capture():
            capturing.set()
            assert ended.wait(PATIENCE_SECONDS)

    other = threading.Thread(target=capture)
    other.start()
    assert capturing.wait(PATIENCE_SECONDS)
    for step in (1, 2):
        loop.run.save(step, loop.state)
        loop.optimizer.step()
    loop.run.wait()
    loop.run.close()
    del loop
    gc.collect()
    ended.set()
    other.join()
    assert fake_cuda.broken == []


def test_a_save_during_a_capture_is_refused_and_touches_nothing(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    loop = Loop(tmp_path / "run")
    loop.run.save(1, loop.state).result(PATIENCE_SECONDS)
    loop.run.wait()
    calls = len(fake_cuda.calls)
    with fake_cuda.capture():
        with pytest.raises(InvalidOption, match=r"step 2: save cannot be called while a CUDA graph is captured"):
            loop.run.save(2, loop.state)
        assert len(fake_cuda.calls) == calls
    assert fake_cuda.broken == []
    loop.run.save(2, loop.state).result(PATIENCE_SECONDS)
    loop.run.close()


def test_memory_that_goes_during_a_capture_goes_beside_it(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    loop = Loop(tmp_path / "run")
    loop.run.save(1, loop.state).result(PATIENCE_SECONDS)
    with fake_cuda.capture():
        loop.run.close()
        del loop
        gc.collect()
    assert ("cudaHostUnregister", threading.current_thread().name) in fake_cuda.calls
    assert fake_cuda.broken == []


def test_a_driver_without_modes_is_not_asked_during_a_capture(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks is told that nobody knows: memory of such copies stays mapped."""
    monkeypatch.setattr(cuda, "exchange_of_driver", lambda: None)
    with fake_cuda.capture(), pytest.raises(RuntimeError, match="while this thread captures"), cuda.on(DEVICE):
        fake_cuda.needs_context("cudaEventQuery")
    assert fake_cuda.broken == []
    with cuda.on(DEVICE):
        fake_cuda.needs_context("cudaEventQuery")


def test_threads_have_the_mode_that_they_had_before(fake_cuda: FakeCuda) -> None:
    with cuda.on(DEVICE), cuda.beside_captures():
        pass
    with fake_cuda.capture(), pytest.raises(RuntimeError, match="not permitted"):
        fake_cuda.needs_context("cudaEventQuery")


def test_an_optimizer_that_a_graph_may_replay_is_never_deferred(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "run")
    owned = loop.run._watched.owned()
    assert {id(tensor) for tensor in owned.holders} >= {id(parameter) for parameter in loop.model.parameters()}
    loop.optimizer.param_groups[0]["capturable"] = True
    for step in (1, 2):
        loop.run.save(step, loop.state).result(PATIENCE_SECONDS)
        assert loop.run._watched.owned().holders == []
    said = [line for line in caplog.messages if "capturable=True" in line]
    assert len(said) == 1
    assert said[0].startswith("SGD has capturable=True")
    loop.run.close()


# -- on a device -------------------------------------------------------------------------------------------------------


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("process", PROCESSES)
def test_on_a_gpu_a_capture_and_a_save_in_flight_do_not_break_each_other(tmp_path: Path, process: str) -> None:
    loop = Loop(tmp_path / "run", process, "cuda")
    loop.run.prepare(loop.state)
    assert loop.run._arena.wait_prepared(60)
    static = torch.ones(64, device="cuda")
    result = torch.zeros(64, device="cuda")
    for step in range(1, 6):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # the copies are queued behind this while the graph is captured
            pending = loop.run.save(step, loop.state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the mode of every other thread counts: the default is "global"
            for _ in range(2000):
                result.copy_(static * 2)
        pending.result(60)
        graph.replay()
        torch.cuda.synchronize()
        assert result.sum().item() == 128
        torch.nn.functional.dropout(static, 0.5)  # after a capture that broke, random operations raise
        loop.optimizer.step()
    assert loop.run.verify(5) == []
    loop.run.close()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_the_first_one_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("pynvml", reason="asks how much memory a device uses without making a context there")
    before = torch.cuda.device_memory_used(0)
    torch.cuda.set_device(1)
    loop = Loop(tmp_path / "run", device="cuda:1")
    for step in (1, 2):
        loop.run.save(step, loop.state).result(60)
        loop.optimizer.step()
    loop.run.close()
    assert torch.cuda.device_memory_used(0) - before < 64 << 20, "a context takes hundreds of MiB"
