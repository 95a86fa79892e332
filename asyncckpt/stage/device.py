"""What a snapshot on a device asks of the device: memory, and one stream on which calls run in order.

``CudaDevice`` is thin, because nobody has run it yet: what can go wrong lies above it, where a stand-in on the CPU
shows it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from asyncckpt.errors import NotEnoughMemory
from asyncckpt.memory import cuda
from asyncckpt.memory.arena import QueuedCopy
from asyncckpt.stage.gather import MakeTable, table_maker


class SnapshotDevice(Protocol):
    """One device, with one stream that lives as long as this object. Thread-safe but for what says otherwise."""

    name: str
    #: Makes tables of addresses for a kernel; None where torch has to copy tensor by tensor.
    make_table: MakeTable | None

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on this device."""

    def room_bytes(self) -> tuple[int, int]:
        """Return how many bytes training leaves free when it takes most, as far as it has gone by now, and how many the
        device has."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """Return new memory of the device, uint8, that calls on the stream may use until it is dropped. Raises
        ``NotEnoughMemory``."""

    def flags(self, count: int) -> torch.Tensor:
        """Return int32 zeros in memory of the host that the device writes into and the host reads meanwhile."""

    def queueing(self) -> contextlib.AbstractContextManager[None]:
        """Return what to be in while several calls are enqueued: then each of them costs less."""

    def enqueue(self, kind: str, call: Callable[[], object]) -> None:
        """Have ``call`` made on the stream, behind all that was enqueued before. ``kind`` says what it does: ``fill``,
        ``gather``, ``drain``, ``tick`` or ``flag``. Does not wait for it."""

    def follow_training(self) -> None:
        """Let what is enqueued from now on run after all that training has enqueued on its current stream. For the
        training thread, outside ``queueing``."""

    def hold_training(self) -> None:
        """Let all that training enqueues from now on, on the stream that was followed, run after what was enqueued here
        so far. For the training thread."""

    def follow(self, copies: QueuedCopy) -> None:
        """Let what is enqueued from now on run after copies that another stream makes. Does not block."""

    def let_follow(self, stream: object) -> None:
        """Let what is enqueued on another stream from now on run after what was enqueued here so far."""

    def is_idle(self) -> bool:
        """Whether all that was enqueued has run. Raises ``RuntimeError`` where the device has failed. Never blocks."""

    def synchronize(self) -> None:
        """Block until all that was enqueued has run. Raises ``RuntimeError`` where the device has failed."""


class CudaDevice:
    """A CUDA device as a snapshot uses it. Makes a stream; for the training thread, outside captures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = str(device)
        self._here = threading.local()
        make: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        with cuda.on(device):
            self._stream = make(device)
            #: The stream that training's operations were enqueued on at the latest save.
            self._training = torch.cuda.current_stream(device)
        self.make_table = table_maker()

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.device

    def room_bytes(self) -> tuple[int, int]:
        with cuda.on(self.device):
            free, total = torch.cuda.mem_get_info(self.device)
            peak = torch.cuda.max_memory_reserved(self.device)
            # what torch has given back since its peak, or holds unused now, belongs to the next forward
            given_back = peak - torch.cuda.memory_reserved(self.device)
            # torch 2.6 does not say what it was told here: then all of the device is taken to be allowed
            fraction = getattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda _: 1.0)
            allowed = int(fraction(self.device) * total)
        return min(free - given_back, allowed - peak), total

    def memory(self, nbytes: int) -> torch.Tensor:
        try:
            # of the stream's own: when it is dropped, no other stream gets it too early
            with self.queueing(), torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(f"{self.name} gives no {nbytes} bytes of memory: {error}") from error

    def flags(self, count: int) -> torch.Tensor:
        with cuda.on(self.device), torch.inference_mode(False):
            return torch.zeros(count, dtype=torch.int32, device="cpu", pin_memory=True)

    @contextlib.contextmanager
    def queueing(self) -> Iterator[None]:
        if getattr(self._here, "queueing", False):
            yield
            return
        with cuda.on(self.device), torch.cuda.stream(self._stream):
            self._here.queueing = True
            try:
                yield
            finally:
                self._here.queueing = False

    def enqueue(self, kind: str, call: Callable[[], object]) -> None:
        with self.queueing():
            call()

    def follow_training(self) -> None:
        with cuda.on(self.device):
            self._training = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(self._training)

    def hold_training(self) -> None:
        with cuda.on(self.device):
            self._training.wait_stream(self._stream)

    def follow(self, copies: QueuedCopy) -> None:
        with cuda.on(self.device):
            copies.wait_on(self._stream)

    def let_follow(self, stream: object) -> None:
        if stream is not self._stream and isinstance(stream, torch.cuda.Stream):
            with cuda.on(self.device):
                stream.wait_stream(self._stream)

    def is_idle(self) -> bool:
        query: Callable[[], bool] = self._stream.query
        with cuda.on(self.device):
            return query()

    def synchronize(self) -> None:
        with cuda.on(self.device):
            self._stream.synchronize()
