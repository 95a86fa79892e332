"""Every stage of a save emits a typed event, which loggers, dashboards and traces subscribe to.

Durations are in seconds and sizes in bytes. ``at_seconds`` is the time at which the event happened, the end of what it
reports, on the clock of ``time.perf_counter``. Subscribers are called on one thread of their own, one event after the
other: they may block, and may call anything, the checkpointer included. They learn of an event shortly after it has
happened, of extents along with the event after them; no save waits for them, only ``close`` does. An exception that one
raises is logged, and never harms the save. In a job every rank emits the events of its own part.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from asyncckpt.errors import InvalidOption
from asyncckpt.notifier import Notifier
from asyncckpt.repeated_lines import hold_back_repeated

log = logging.getLogger("asyncckpt")
hold_back_repeated(log)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """``Event`` is the base of all events. ``step`` is the training step of the checkpoint that it is about, and
    ``thread`` the name of the thread on which it happened."""

    step: int
    at_seconds: float = field(default_factory=time.perf_counter)
    thread: str = field(default_factory=lambda: threading.current_thread().name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveStarted(Event):
    """A save has begun. ``nbytes`` is the size of its shards; ``deferred`` says that tensors of watched optimizers may
    be copied after ``save`` has returned."""

    nbytes: int
    deferred: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalled(Event):
    """The training thread has spent ``seconds`` inside asyncckpt. ``where`` says in which call: ``save``,
    ``optimizer.step`` or ``guard``."""

    seconds: float
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtentStaged(Event):
    """One extent, or several that are neighbours in a file, of ``nbytes`` together, have been copied into the arena, or
    their copies enqueued on the device, in ``seconds``."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtentWritten(Event):
    """One extent, or several that are neighbours in a file, of ``nbytes`` together, have been hashed and written;
    ``seconds`` is how long the write took."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged(Event):
    """The whole snapshot, of ``nbytes``, has been copied: training may change anything. It took ``seconds`` from the
    call of ``save``."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Written(Event):
    """All shards, of ``nbytes`` together, are written and fsynced, ``seconds`` after the call of ``save``."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SlowestRank:
    """Says which ``rank`` of a job was the last to have done a ``phase`` of a save: ``stage`` (its tensors are copied)
    or ``write`` (its files are durable). ``seconds`` after its own call of ``save``; half of the ranks took at most
    ``median_seconds``."""

    phase: str
    rank: int
    seconds: float
    median_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksReported(Event):
    """All ``ranks`` of a job have reported what they wrote of a save; rank 0 emits it. Once its own part was durable,
    rank 0 waited ``waited_seconds`` for the others, ``last_rank`` being the one that it waited for longest. Where that
    is long and no rank is in ``slowest`` for long, that rank called ``save`` late."""

    ranks: int
    waited_seconds: float
    last_rank: int
    slowest: tuple[SlowestRank, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Event):
    """The checkpoint at ``path``, of that ``checkpoint_kind`` and with these ``metrics``, is durable and visible.
    ``nbytes`` is the size of all its files, where the events before this one count the shards alone; ``written_bytes``
    is the part that this process wrote. ``durable_seconds`` have passed since the call of ``save``, the last
    ``commit_seconds`` of them after the shards were written; the training thread spent ``stall_seconds`` inside
    asyncckpt. ``state_bytes``: what the tensors would take as they are, without compression."""

    path: str
    nbytes: int
    written_bytes: int
    durable_seconds: float
    stall_seconds: float
    commit_seconds: float
    checkpoint_kind: str = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)
    state_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed(Event):
    """The save has failed with ``error``, and nothing was published."""

    error: BaseException


@dataclass(frozen=True, kw_only=True, slots=True)
class Busy(Event):
    """A save was due while ``in_flight`` earlier ones left no room for it. ``policy`` says what is done about it:
    ``wait``, ``skip`` or ``error``, as in ``StagingOptions.on_busy``."""

    policy: str
    in_flight: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedEagerly(Event):
    """These ``tensors`` of watched optimizers were changed between ``save`` and the moment their update began, so from
    now on they are copied before ``save`` returns. Each is named once in a run. Changes inside ``guard()`` do not
    count."""

    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRebuilt(Event):
    """The state of this save was read and planned from the beginning, which takes longer on the training thread,
    because of ``reason``: nobody can vouch that ``component`` is what it was at an earlier save, or it has changed. An
    empty ``component`` is the state as a whole. Each reason is told once for each component."""

    component: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotOnHost(Event):
    """With ``snapshot="auto"``, the snapshot of this save was not taken on the device, where it would take ``nbytes``,
    because of ``reason``. It is told once for each size."""

    nbytes: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned(Event):
    """Retention has deleted the checkpoint ``name``, or has left it because somebody reads it (``deleted=False``)."""

    name: str
    deleted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinnedOut(Event):
    """Retention has left the weights alone of the checkpoint ``name``, as the checkpoint ``left``. Files of
    ``freed_bytes`` are not in that one."""

    name: str
    left: str
    freed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FellBack(Event):
    """The checkpoint at ``path`` could not be restored, for this ``reason``, and the one before it is tried."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored(Event):
    """The checkpoint at ``path`` has been read back into live objects: ``nbytes`` in ``seconds``, every one of them
    verified."""

    path: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksChanged(Event):
    """A checkpoint of ``saved_ranks`` ranks was restored by a job of ``ranks``, and this is what became of components
    that each rank has of its own. ``derived``: this ``rank`` got random streams of its own, which no rank had saved.
    ``dropped``: ranks that are gone had a state of them, and nobody has it now."""

    rank: int
    ranks: int
    saved_ranks: int
    derived: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preempting(Event):
    """A preemption signal has arrived (``signal`` is its name). A last save follows, to be durable within
    ``deadline_seconds``."""

    signal: str
    deadline_seconds: float


Subscriber = Callable[[Event], None]


class EventBus:
    """Hands every event to every subscriber, on the thread of ``notifier``. Thread-safe."""

    def __init__(self, subscribers: tuple[Subscriber, ...] = ()) -> None:
        self.notifier = Notifier()
        self._subscribers = subscribers
        #: Called with every event where it happens, before any subscriber is: it must be quick and raise nothing.
        self.note: Subscriber | None = None

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call ``subscriber`` with every event from now on."""
        self._subscribers = (*self._subscribers, subscriber)

    def emit(self, event: Event) -> None:
        """Log the event on this thread, and have every subscriber called with it on theirs. Never blocks."""
        try:
            log_event(event)
        except Exception:  # a logging handler of the program's own
            log.exception("logging %s failed", type(event).__name__)
        if self.note is not None:
            self.note(event)
        soon = not isinstance(event, ExtentStaged | ExtentWritten)
        for subscriber in self._subscribers:
            what = f"the event subscriber {subscriber!r:.100} on {type(event).__name__}"
            self.notifier.post(what, functools.partial(subscriber, event), soon=soon)


def subscribers_of(on_event: Subscriber | Sequence[Subscriber]) -> tuple[Subscriber, ...]:
    """Return the subscribers that ``on_event`` is or lists. Raises ``InvalidOption`` for what cannot be called."""
    found = tuple(on_event) if isinstance(on_event, Sequence) else (on_event,)
    for subscriber in found:
        if not callable(subscriber):
            raise InvalidOption(f"on_event takes functions that are called with each event, not {subscriber!r:.80}")
    return found


def log_event(event: Event) -> None:
    """Log an event on the logger ``asyncckpt``: stages at DEBUG, commits at INFO, trouble at WARNING and ERROR. It is
    called for every event, on the thread where that happens."""
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
        case CopiedEagerly(tensors=tensors):
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            log.warning(
                "%s%s changed between the save of step %d and the optimizer's update, and not inside guard(): copied "
                "before save() returns from now on",
                ", ".join(tensors[:3]),
                more,
                event.step,
            )
        case FellBack():
            log.error("checkpoint %s cannot be used (%s); falling back to the one before", event.path, event.reason)
        case RanksChanged():
            for name in event.derived:
                log.warning(
                    "step %d: %d ranks saved %s, so rank %d of %d has no state of it: its random streams are derived "
                    "from rank 0's",
                    *(event.step, event.saved_ranks, name, event.rank, event.ranks),
                )
            for name in event.dropped:
                log.warning(
                    "step %d: %d ranks saved %s, each its own, and the job has %d: the states of the others are not "
                    "restored (asyncckpt.PerRank takes a rule for them)",
                    *(event.step, event.saved_ranks, name, event.ranks),
                )
        case Preempting():
            log.warning("%s: saving step %d within %.0f s", event.signal, event.step, event.deadline_seconds)
        case ThinnedOut():
            log.info("step %d: the weights alone are left, as %s", event.step, event.left)
        case Pruned(deleted=False):
            log.info("step %d is being read; retention left it", event.step)
        case ExtentStaged() | ExtentWritten():
            pass  # a save has hundreds: they are for traces, not for a log
        case _:
            log.debug("%s", event)
