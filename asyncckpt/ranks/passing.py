"""Bytes pass from rank to rank through the process group that the job has anyway: gloo in host memory, NCCL on devices.

Nothing here waits without a deadline: a rank that was lost in the middle ends the passing, not the job's life.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch

from asyncckpt.errors import RankLost
from asyncckpt.memory import cuda
from asyncckpt.ranks.reading_plan import Message
from asyncckpt.state.dtensor import job_size

_SHORTEST_PAUSE_SECONDS: Final = 0.0002
_LONGEST_PAUSE_SECONDS: Final = 0.005
#: The kinds of process groups that carry bytes, and the device on which they do, the better first.
_CARRIERS: Final = (("nccl", "cuda"), ("gloo", "cpu"))


@dataclass(slots=True)
class Ticket:
    """Stands for a message on its way. ``memory``: what is sent from, or received into."""

    message: Message
    memory: torch.Tensor
    works: list[Any]


class Passing:
    """Passes messages between the ranks of the job's default process group.

    One thread begins messages: all ranks begin those of a phase in the same order, each those that it sends or
    receives. A message that all ranks receive is a broadcast. Other threads may end them."""

    def __init__(self, rank: int, size: int, kind: str, device: str, timeout_seconds: float) -> None:
        self._rank, self._size = rank, size
        self._timeout_seconds = timeout_seconds
        self.kind = kind
        self._device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)

    @classmethod
    def of_job(cls, rank: int, size: int, timeout_seconds: float) -> Passing | None:
        """Return what carries bytes between the ranks of this process's job; None where nothing does."""
        kind, device = carrier_of(size)
        return cls(rank, size, kind, device, timeout_seconds) if kind else None

    def memory(self, nbytes: int, host: torch.Tensor) -> torch.Tensor:
        """Return memory that can be passed on or received into: ``host`` itself, which has at least so many bytes, or
        new memory on the device. Raises ``torch.OutOfMemoryError``."""
        if self._device.type == "cpu":
            return host
        with cuda.on(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def begin(self, message: Message, memory: torch.Tensor, host: torch.Tensor) -> Ticket:
        """Begin to send, or to receive, a message. ``memory``: from ``memory()``; ``host``: what is sent, or where
        ``end`` puts what was received. Both have the message's size or more. Raises ``RankLost``."""
        memory = memory[: message.nbytes]
        sends = message.owner == self._rank
        with self._on_device():
            if sends and memory.device.type != "cpu":
                memory.copy_(host[: message.nbytes])
            try:
                works = self._pass(message, memory, sends)
            except (RuntimeError, torch.distributed.DistError) as error:
                raise self._lost(message, error) from error
        return Ticket(message, memory, works)

    def end(self, ticket: Ticket, host: torch.Tensor) -> None:
        """Block until a message was sent, or received into ``host``. Raises ``RankLost``, at the latest after the
        timeout."""
        message, memory = ticket.message, ticket.memory
        on_device = memory.device.type != "cpu"
        for work in ticket.works:
            try:
                if on_device:
                    self._poll(work, message)
                elif not work.wait(timedelta(seconds=self._timeout_seconds)):
                    raise self._lost(message, f"nothing came for {self._timeout_seconds:.0f} s")
            except RankLost:
                raise
            except (RuntimeError, torch.distributed.DistError) as error:
                raise self._lost(message, error) from error
        if on_device and message.owner != self._rank:
            with self._on_device():
                host[: message.nbytes].copy_(memory)

    def _on_device(self) -> contextlib.AbstractContextManager[None]:
        return cuda.on(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _poll(self, work: Any, message: Message) -> None:
        """Wait for a device's work: its own ``wait`` only has the device wait."""
        began = time.monotonic()
        pause = _SHORTEST_PAUSE_SECONDS
        while not self._is_completed(work):
            if time.monotonic() - began > self._timeout_seconds:
                raise self._lost(message, f"nothing came for {self._timeout_seconds:.0f} s")
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 1.5 * pause)
        with self._on_device():
            work.wait()

    def _is_completed(self, work: Any) -> bool:
        with self._on_device():
            return bool(work.is_completed())

    def _pass(self, message: Message, memory: torch.Tensor, sends: bool) -> list[Any]:
        dist = torch.distributed
        if len(message.receivers) == self._size - 1:
            return [dist.broadcast(memory, src=message.owner, async_op=True)]
        operation = dist.isend if sends else dist.irecv
        peers: Sequence[int] = message.receivers if sends else (message.owner,)
        return list(dist.batch_isend_irecv([dist.P2POp(operation, memory, peer) for peer in peers]))

    def _lost(self, message: Message, reason: object) -> RankLost:
        others = sorted({message.owner, *message.receivers} - {self._rank})
        return RankLost(
            f"bytes that ranks read for each other did not pass between rank {self._rank} and ranks {others[:16]} "
            f"({reason}): one of them died, hangs, or was stopped"
        )


def carrier_of(size: int) -> tuple[str, str]:
    """Return the kind of the job's default process group that carries bytes, and its device; empty where there is none
    of all ``size`` ranks."""
    if job_size() != size:
        return "", ""
    # one text of pairs such as cpu:gloo,cuda:nccl
    there = dict(pair.split(":", 1) for pair in str(torch.distributed.get_backend_config()).split(",") if ":" in pair)
    for kind, device in _CARRIERS:
        usable: Callable[[], bool] = torch.cuda.is_initialized
        if there.get(device) == kind and (device == "cpu" or usable()):
            return kind, device
    return "", ""
