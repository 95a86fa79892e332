"""Typed events, one for every stage of a save: what a logger, a dashboard or a trace is fed with.

All times are seconds on ``time.perf_counter``'s clock (``at_seconds`` is when the event happened, the end of whatever
it reports); sizes are bytes. Subscribers are called on the thread where the event happens, so they must be quick and
must not call back into the checkpointer; one that raises is logged and never harms the save.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Any event. ``step`` is the checkpoint's step."""

    step: int
    at_seconds: float = field(default_factory=time.perf_counter)
    thread: str = field(default_factory=lambda: threading.current_thread().name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveStarted(Event):
    """``save`` was called. ``deferred``: tensors of watched optimizers are copied after it returns."""

    nbytes: int
    deferred: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalled(Event):
    """The training thread spent ``seconds`` inside asyncckpt; ``where``: ``save``, ``optimizer.step`` or ``guard``."""

    seconds: float
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtentStaged(Event):
    """One extent was copied into the arena."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtentWritten(Event):
    """One extent was hashed and written."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged(Event):
    """The whole snapshot is in the arena or written: training may change anything. ``seconds`` since ``save``."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Written(Event):
    """All shards are written and fsynced. ``seconds`` since ``save``."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Event):
    """The checkpoint is durable and visible. ``nbytes`` is its size on disk, all files; in the events before it, the
    shards' size. ``durable_seconds`` since ``save``; ``stall_seconds`` of training."""

    path: str
    nbytes: int
    written_bytes: int
    durable_seconds: float
    stall_seconds: float
    commit_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed(Event):
    """The save failed; nothing was published."""

    error: BaseException


@dataclass(frozen=True, kw_only=True, slots=True)
class Busy(Event):
    """A save was due while earlier ones held the arena; ``policy`` is what was done about it."""

    policy: str
    in_flight: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned(Event):
    """Retention deleted checkpoint ``step``, or wanted to and left it because it is being read (``deleted=False``)."""

    name: str
    deleted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FellBack(Event):
    """``resume`` could not use checkpoint ``step`` and went to the one before."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored(Event):
    """A checkpoint was read back into live objects, every byte of it verified."""

    path: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Preempting(Event):
    """A preemption signal arrived; a last save follows, to be durable within ``deadline_seconds``."""

    signal: str
    deadline_seconds: float


Subscriber = Callable[[Event], None]


class EventBus:
    """Fans events out to subscribers. Thread-safe."""

    def __init__(self, subscribers: tuple[Subscriber, ...] = ()) -> None:
        self._subscribers = (log_event, *subscribers)

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers = (*self._subscribers, subscriber)

    def emit(self, event: Event) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                log.exception("an event subscriber failed on %s", type(event).__name__)


def log_event(event: Event) -> None:
    """The default subscriber: stages at DEBUG, commits at INFO, trouble at WARNING and ERROR, on logger
    ``asyncckpt``."""
    match event:
        case Committed():
            log.info(
                "step %d durable: %s, %.2f GB in %.2f s (stall %.1f ms)",
                event.step,
                event.path,
                event.nbytes / 1e9,
                event.durable_seconds,
                event.stall_seconds * 1e3,
            )
        case Failed():
            log.error("step %d was not saved: %s", event.step, event.error)
        case Busy():
            log.warning("step %d: %d earlier saves in flight; policy %s", event.step, event.in_flight, event.policy)
        case FellBack():
            log.error("checkpoint %s cannot be used (%s); falling back to the one before", event.path, event.reason)
        case Preempting():
            log.warning("%s: saving step %d within %.0f s", event.signal, event.step, event.deadline_seconds)
        case Pruned(deleted=False):
            log.info("step %d is being read; retention left it", event.step)
        case ExtentStaged() | ExtentWritten():
            pass  # hundreds a save: for traces, not for a log
        case _:
            log.debug("%s", event)
