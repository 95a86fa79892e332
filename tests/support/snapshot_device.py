"""A stand-in takes the place of a device on which snapshots are taken: what is enqueued runs later, on a thread, in
order, kind by kind as a test lets it."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, NotEnoughMemory, StagingOptions, starter
from asyncckpt.stage.gather import MakeTable

PATIENCE_SECONDS = 20.0
DEVICE = torch.device("cuda", 0)


class StandIn:
    """A device whose memory is that of the host. ``held``: kinds of calls that wait until ``release``. ``ran``: the
    kinds of all calls that were made, in order. ``free_bytes``: what training leaves free of ``total_bytes``.
    ``of_host``: tensors that do not lie on it."""

    def __init__(self, *, make_table: MakeTable | None = None) -> None:
        self.name = "the stand-in"
        self.make_table = make_table
        self.free_bytes, self.total_bytes = 8 << 30, 16 << 30
        self.of_host: list[torch.Tensor] = []
        self.ran: list[str] = []
        self.enqueued: list[str] = []
        self.allocated: list[int] = []
        self.fails: dict[str, BaseException] = {}
        self.loses_flags = False
        self._held: set[str] = set()
        self._changed = threading.Condition()
        self._calls: queue.SimpleQueue[tuple[str, Callable[[], object]]] = queue.SimpleQueue()
        self._left = 0
        threading.Thread(target=self._run, daemon=True).start()

    def hold(self, *kinds: str) -> None:
        with self._changed:
            self._held.update(kinds)

    def release(self) -> None:
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            kind, call = self._calls.get()
            with self._changed:
                if not self._changed.wait_for(lambda kind=kind: kind not in self._held, PATIENCE_SECONDS):
                    return  # the test ended without releasing it
            if not (kind == "flag" and self.loses_flags):
                call()
            with self._changed:
                self.ran.append(kind)
                self._left -= 1
                self._changed.notify_all()

    # -- what a device does ------------------------------------------------------------------------------------------

    def has(self, tensor: torch.Tensor) -> bool:
        return not any(tensor is one for one in self.of_host)

    def room_bytes(self) -> tuple[int, int]:
        return self.free_bytes, self.total_bytes

    def memory(self, nbytes: int) -> torch.Tensor:
        if self.free_bytes < nbytes:
            raise NotEnoughMemory("the stand-in has no memory")
        self.allocated.append(nbytes)
        self.free_bytes -= nbytes
        with torch.inference_mode(False):
            return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def flags(self, count: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(count, dtype=torch.int32)

    def queueing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def enqueue(self, kind: str, call: Callable[[], object]) -> None:
        if kind in self.fails:
            raise self.fails[kind]
        with self._changed:
            self._left += 1
        self.enqueued.append(kind)
        self._calls.put((kind, functools.partial(_in_mode, torch.is_inference_mode_enabled(), call)))

    def follow_training(self) -> None:
        """Do nothing: what training does on the CPU is done."""

    def hold_training(self) -> None:
        """Wait for what was enqueued, since training's next operation on the CPU would not wait by itself."""
        self.synchronize()

    def follow(self, copies: Any) -> None:
        self.enqueue("wait", copies.wait)

    def let_follow(self, stream: Any) -> None:
        if stream is not self:
            stream.tasks.put(self.synchronize)

    def is_idle(self) -> bool:
        with self._changed:
            return not self._left

    def synchronize(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._left, PATIENCE_SECONDS)


def _in_mode(inference: bool, call: Callable[[], object]) -> None:
    """Make a call as the thread that enqueues it would: on a device it is made right then."""
    with torch.inference_mode(inference):
        call()


def on_a_device(patch: pytest.MonkeyPatch, run: Checkpointer, device: StandIn) -> StandIn:
    """Have a checkpointer find its state on ``device``."""
    patch.setattr(starter, "cuda_devices", lambda tensors: {DEVICE} if tensors else set())
    run._starter.snapshots.make_device = lambda _: device
    return device


def device_options(**options: Any) -> StagingOptions:
    return StagingOptions(snapshot="device", **options)
