"""A stand-in takes the place of ``torch.cuda``, and knows what the real one does behind one's back.

A call that needs a context makes one on its thread's device, which is device 0 unless the thread has said otherwise. A
call that does not belong to a capture breaks it, unless the calling thread said before that it is beside captures.
Copies are those of CPU tensors; the events after them happen when ``finish`` is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from asyncckpt import saver, starter
from asyncckpt.memory import cuda

DEVICE = torch.device("cuda", 1)
PATIENCE_SECONDS = 20.0
_REAL = torch.cuda


class FakeCuda:
    """One process's CUDA. ``contexts``: the threads, by the device that they have made a context on. ``calls``: what
    was called, by which thread."""

    def __init__(self) -> None:
        self._here = threading.local()
        self.contexts: dict[int, set[str]] = {}
        self.calls: list[tuple[str, str]] = []
        self.finished = threading.Event()
        self.finished.set()
        self.capturing: int | None = None
        self.broken: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_REAL, name)

    # -- what only the stand-in knows --------------------------------------------------------------------------------

    def needs_context(self, call: str, *, belongs_to_captures: bool = False) -> None:
        """Do what every call of CUDA does: it has a context made, and is checked against captures."""
        name = threading.current_thread().name
        self.calls.append((call, name))
        self.contexts.setdefault(self.current_device(), set()).add(name)
        relaxed = getattr(self._here, "mode", 0) == 2
        if self.capturing is not None and not relaxed and not belongs_to_captures:
            self.broken.append(f"{call} on {name}")
            raise RuntimeError("operation not permitted when stream is capturing")

    def exchange(self, mode: ctypes.c_int) -> int:
        """Do what the driver's cuThreadExchangeStreamCaptureMode does."""
        before, self._here.mode = getattr(self._here, "mode", 0), mode.value
        mode.value = before
        return 0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Capture a graph on this thread, globally: no thread may make a call that does not belong to it."""
        self.capturing = threading.get_ident()
        try:
            yield
        finally:
            self.capturing = None

    # -- what torch.cuda has -----------------------------------------------------------------------------------------

    def is_initialized(self) -> bool:
        return True

    def is_current_stream_capturing(self) -> bool:
        return self.capturing == threading.get_ident()

    def current_device(self) -> int:
        return getattr(self._here, "device", 0)

    def set_device(self, device: int) -> None:
        self._here.device = device

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current_device()
        self.set_device(device.index)
        yield
        self.set_device(before)  # torch makes no context here

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return Stream(self, torch.device("cuda", self.current_device()) if device is None else device)

    def Stream(self, device: torch.device) -> Stream:
        self.needs_context("cudaStreamCreate")
        return Stream(self, device)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_device()
        self.set_device(stream.device.index)
        yield
        self.set_device(before)
        if before != stream.device.index:  # and here it does
            self.needs_context("cudaSetDevice")

    def cudart(self) -> Any:
        return self

    def cudaHostRegister(self, *_: int) -> int:
        self.needs_context("cudaHostRegister")
        return 0

    def cudaHostUnregister(self, _: int) -> None:
        self.needs_context("cudaHostUnregister")


class Stream:
    """A stream of the stand-in. It says of its calls what torch does: those have a guard of the stream's device."""

    def __init__(self, fake: FakeCuda, device: torch.device) -> None:
        self._fake = fake
        self.device = device

    def record_event(self) -> Event:
        with self._fake.device(self.device):
            self._fake.needs_context("cudaEventRecord", belongs_to_captures=True)
        return Event(self._fake)

    def wait_event(self, _event: Event) -> None:
        with self._fake.device(self.device):
            self._fake.needs_context("cudaStreamWaitEvent", belongs_to_captures=True)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def query(self) -> bool:
        with self._fake.device(self.device):
            self._fake.needs_context("cudaStreamQuery")
        return self._fake.finished.is_set()

    def synchronize(self) -> None:
        with self._fake.device(self.device):
            self._fake.needs_context("cudaStreamSynchronize")
        assert self._fake.finished.wait(PATIENCE_SECONDS)


class Event:
    """An event of the stand-in. To ask for one, torch takes whatever device the thread has."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake

    def query(self) -> bool:
        self._fake.needs_context("cudaEventQuery")
        return self._fake.finished.is_set()

    def synchronize(self) -> None:
        self._fake.needs_context("cudaEventSynchronize")
        assert self._fake.finished.wait(PATIENCE_SECONDS)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A process whose training thread uses ``DEVICE``, on which all tensors seem to lie."""
    fake = FakeCuda()
    fake.set_device(DEVICE.index)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(cuda, "exchange_of_driver", lambda: fake.exchange)
    for module in (saver, starter):
        monkeypatch.setattr(module, "cuda_devices", lambda tensors: {DEVICE} if tensors else set())
    yield fake
    fake.finished.set()
