"""What ranks pass to each other is received into slots, and placed by threads while more of it comes."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Final, Self

import torch

from asyncckpt import interrupts
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.ranks.host_memory import HostMemory
from asyncckpt.ranks.passing import Passing, Ticket
from asyncckpt.ranks.reading_plan import MESSAGE_BYTES, Message
from asyncckpt.read.extents import READ_THREADS

#: What was received and is not placed yet takes at most this many bytes, or two messages where those are larger.
_WINDOW_BYTES: Final = 64 << 20
#: Whoever breaks off waits so long for threads that are still placing bytes.
STOPPING_SECONDS: Final = 30.0


class Slot:
    """Holds memory for one message that is received: ``memory`` as the process group takes it, ``host`` for the CPU."""

    def __init__(self, passing: Passing, nbytes: int) -> None:
        self.host = memory_of(nbytes)
        self.memory = passing.memory(nbytes, self.host)


class Slots:
    """Holds the slots that no message is received into at the moment. Raises ``MemoryError`` and what a device does."""

    def __init__(self, passing: Passing, nbytes: int) -> None:
        self.free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(max(2, _WINDOW_BYTES // max(nbytes, MESSAGE_BYTES))):
            self.free.put(Slot(passing, nbytes))


class Placing:
    """Ends messages on threads of its own, and places what was received. ``place``: is called with each message that
    was received, and its bytes. What it raises is raised by ``finish``: until then messages are received all the same,
    because other ranks are in the middle of sending them. A context manager: at its end no thread places anything any
    more."""

    def __init__(
        self,
        passing: Passing | HostMemory,
        slots: Slots | None,
        rank: int,
        place: Callable[[Message, torch.Tensor], None],
    ) -> None:
        self._passing = passing
        self._slots = slots
        self._rank = rank
        self._place = place
        self._tickets: queue.SimpleQueue[tuple[Ticket, torch.Tensor, Slot | None] | None] = queue.SimpleQueue()
        self._ended = [threading.Event() for _ in range(READ_THREADS)]
        #: What is raised at the end, and what has ended the passing.
        self._error: BaseException | None = None
        self._lost: BaseException | None = None
        self._broken_off = False
        self._busy = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        for number, ended in enumerate(self._ended):
            name = f"asyncckpt-placing-{number}"
            threading.Thread(target=self._work, args=(ended,), name=name, daemon=True).start()
        return self

    def slot(self) -> Slot:
        """Return a free slot. Blocks until there is one. Raises what has ended the passing."""
        while True:
            self._raise_lost()
            if self._slots is None:
                raise LookupError("there are no slots to receive into")
            with contextlib.suppress(queue.Empty):
                return self._slots.free.get(timeout=interrupts.SLICE_SECONDS)

    def take(self, ticket: Ticket, host: torch.Tensor, slot: Slot | None) -> None:
        """Have a thread end a message that has begun; ``slot`` becomes free again afterwards."""
        self._tickets.put((ticket, host, slot))

    def finish(self) -> None:
        """Block until all is sent, and all that was received is placed. Raises what has ended the passing, at once, and
        what could not be placed, at the end."""
        self._close()
        for ended in self._ended:
            while not ended.wait(interrupts.SLICE_SECONDS):
                self._raise_lost()
        self._raise_lost()
        if self._error is not None:
            raise self._error

    def __exit__(self, *_: object) -> None:
        self._close()
        with self._changed:  # a thread that still waits for a rank that was lost will place nothing
            self._broken_off = True
            self._changed.wait_for(lambda: not self._busy, STOPPING_SECONDS)

    def _close(self) -> None:
        for _ in self._ended:
            self._tickets.put(None)

    def _raise_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _may_place(self) -> bool:
        with self._changed:
            self._busy += not self._broken_off
            return not self._broken_off

    def _placed(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def _work(self, ended: threading.Event) -> None:
        try:
            while (taken := self._tickets.get()) is not None:
                ticket, host, slot = taken
                try:
                    self._passing.end(ticket, host)
                except BaseException as error:
                    self._lost = self._lost or error
                    return
                if ticket.message.owner != self._rank and self._error is None and self._may_place():
                    try:
                        self._place(ticket.message, host)
                    except BaseException as error:
                        self._error = self._error or error
                    finally:
                        self._placed()
                if slot is not None and self._slots is not None:
                    self._slots.free.put(slot)
        finally:
            ended.set()


def memory_of(nbytes: int) -> torch.Tensor:
    """Return new memory of the host, aligned as O_DIRECT wants it."""
    return torch.frombuffer(aligned_buffer(nbytes), dtype=torch.uint8)
