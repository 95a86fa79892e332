"""The background process takes saves from their staged bytes to published checkpoints, as the trainer's threads would.

It asks the trainer before it makes a checkpoint visible. Where the trainer is gone, it goes on by itself: what was
sealed is published, with the lease that it has the lock of, and everything else is removed. Then it ends.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from asyncckpt.background.adopted import AdoptedRun
from asyncckpt.background.failures import as_data, from_data
from asyncckpt.background.mapped import MappedArena
from asyncckpt.background.messages import (
    Answer,
    Begin,
    Broken,
    Commit,
    Hello,
    LayoutMade,
    MemoryShort,
    RegionShared,
    ReplaceStuck,
    Sealed,
)
from asyncckpt.background.reports import LogHandler, Reports
from asyncckpt.background.wire import Channel, HandedUnit
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.commit.publication import verify_attempt
from asyncckpt.commit.publisher import Solo
from asyncckpt.commit.room import make_room
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import CheckpointDamaged, SaveAbandoned
from asyncckpt.events import Event, EventBus
from asyncckpt.manifest.records import Manifest
from asyncckpt.scope import SaveScope
from asyncckpt.stage.staged import StagedUnit
from asyncckpt.stage.units import Units
from asyncckpt.storage.local import LocalStore
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.threads import Pools, WriterPool

log = logging.getLogger("asyncckpt")

#: How long a failed save's writes may stay in the kernel before their threads are given up.
_STUCK_SECONDS = 30.0


class _Damaged(Quarantine):
    """Holds the names of damaged checkpoints, as the trainer has told them, and tells it of others."""

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports

    def hear(self, names: Sequence[str]) -> None:
        """Note that these are damaged, and no others."""
        for name in {*self.names(), *names}:
            if name in names:
                super().add(name)
            else:
                self.discard(name)

    def add(self, name: str) -> None:
        super().add(name)
        self._reports.send({"about": "damaged", "name": name})


class _Bus(EventBus):
    """Reports every event instead of handing it to subscribers."""

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports

    def emit(self, event: Event) -> None:
        self._reports.happened(event)


class _Save:
    """A save in this process. ``submitted``: whether its end was begun."""

    def __init__(self, begin: Begin, transaction: SaveTransaction) -> None:
        self.begin = begin
        self.transaction = transaction
        layout = transaction.contents.layout
        self.units = Units(layout.extents(), layout.cache.setdefault("units", {}))
        self.sealed = False
        self.submitted = False


class Server:
    """Serves one trainer over a channel. ``serve`` is for the main thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._reports = Reports(channel)
        self._damaged = _Damaged(self._reports)
        self._events = _Bus(self._reports)
        self._arena = MappedArena(self._reports.written)
        #: The newest layout, which is that of the saves that begin, and its number.
        self._layout: LayoutMade | None = None
        self._saves: dict[int, _Save] = {}
        self._commits = WriterPool(1, "asyncckpt-committer")
        #: Failed saves with a write that hangs. For the committer's thread.
        self._hanging: list[SaveTransaction] = []
        #: What this process waits for an answer to, by number.
        self._asked: dict[int, tuple[threading.Event, list[Answer]]] = {}
        self._asking = threading.Lock()
        self._calls = 0
        self._adopted: AdoptedRun | None = None
        self._alone = threading.Event()
        #: What this process has published last since the trainer is gone.
        self._newest = ""

    def log_handler(self) -> logging.Handler:
        """Return a handler for what this process logs."""
        return LogHandler(self._reports)

    def serve(self) -> None:
        """Do what the trainer says until it is gone, and finish what it has left. Blocks."""
        hello = self._channel.receive()
        if not isinstance(hello, Hello):
            return
        self._open(hello)
        self._reports.send({"about": "ready", "pid": os.getpid()})
        while (message := self._channel.receive()) is not None:
            self._handle(message)
        self._finish_alone()

    def _open(self, hello: Hello) -> None:
        self._store = LocalStore(hello.path, direct=hello.direct)
        self._reuse = ReuseSource(self._store, self._damaged)
        for kind, names in hello.known.items():
            for name in names:
                self._reuse.learn(kind, name)
        self._pools = Pools(hello.threads)
        self._encoder = Encoder(hello.codec, hello.threads)
        if hello.lease is not None:
            self._adopted = AdoptedRun(self._store, hello.lease, self._channel.take_descriptor())

    # -- messages ----------------------------------------------------------------------------------------------------

    def _handle(self, message: object) -> None:
        match message:
            case list():
                for unit in message:
                    self._take(unit)
            case Begin():
                self._begin(message)
            case Sealed(save=number) if number in self._saves:
                save = self._saves[number]
                save.sealed = True
                save.transaction.scope.verdict()
            case Commit(save=number) if number in self._saves:  # not one that has failed and ended meanwhile
                save = self._saves[number]
                save.begin = replace(save.begin, parent=message.parent, replaces=message.replaces)
                self._submit(save)
            case Broken(save=number, error=error) if number in self._saves:
                save = self._saves[number]
                save.transaction.scope.give_up(from_data(error))
                self._submit(save)  # nobody will say that it is to be published: its end is to be removed
            case Answer(call=call):
                answered, found = self._asked[call]
                found.append(message)
                answered.set()
            case LayoutMade():
                self._layout = message
            case RegionShared():
                self._arena.add(message.number, self._channel.take_descriptor(), message.nbytes)
                self._arena.budget_bytes = message.budget_bytes
            case MemoryShort(waiting=waiting):
                self._arena.waiting = waiting
                self._pools.start_held()
            case ReplaceStuck(save=number) if number in self._saves:
                self._saves[number].transaction.shards.replace_stuck_threads(message.stuck_seconds)

    def _begin(self, begin: Begin) -> None:
        made = self._layout
        assert made is not None
        assert made.number == begin.layout
        contents = replace(begin.contents, layout=made.layout)
        scope = SaveScope(contents.draft.step)
        scope.await_verdict()
        self._damaged.hear(begin.quarantined)
        transaction = SaveTransaction(
            contents,
            scope,
            Solo(),
            store=self._store,
            space=self,
            source=self._reuse if begin.reuse else None,
            chain=begin.chain,
            pools=self._pools,
            arena=self._arena,
            encoder=self._encoder,
            events=self._events,
            started_seconds=begin.started_seconds,
        )
        self._saves[begin.save] = _Save(begin, transaction)
        scope.when_failed(lambda: self._tell_of_failure(begin.save, scope))

    def _take(self, unit: HandedUnit) -> None:
        self._arena.waiting = unit.waiting
        slot = self._arena.slot(unit)
        save = self._saves.get(unit.save)
        if save is None:  # it has failed and ended meanwhile
            self._arena.release(slot)
            return
        save.transaction.shards.submit(StagedUnit(save.units.of(unit.first, unit.extents), slot, _copied))

    def _tell_of_failure(self, number: int, scope: SaveScope) -> None:
        error, save = scope.error, self._saves.get(number)
        if error is not None and save is not None:
            if isinstance(error, CheckpointDamaged):  # the one before is damaged: write everything next time
                self._reuse.forget(save.begin.contents.draft.kind)
            typed = save.transaction.typed(error)
            if typed is not error:
                typed.__cause__ = error
            self._reports.send({"about": "failed", "save": number, "error": as_data(typed)})

    # -- what only the trainer can decide ------------------------------------------------------------------------------

    def make_room(self, nbytes: int, step: int) -> None:
        """See ``SpaceReserver``."""
        others = [save.transaction for save in list(self._saves.values()) if save.transaction.step != step]
        reserved = sum(other.shards.unwritten_bytes() for other in others)
        make_room(self._store, nbytes, step, reserved, lambda: self._ask({"about": "prune"}))

    def _ask(self, message: dict[str, object]) -> bool:
        """Ask the trainer for something and wait until it is done. Raises what that has raised. Returns False where the
        trainer is gone."""
        answered, found = threading.Event(), list[Answer]()
        with self._asking:
            self._calls += 1
            call = self._calls
            self._asked[call] = answered, found
        self._reports.send({**message, "call": call})
        while not answered.wait(0.2):
            if self._alone.is_set():
                break
        del self._asked[call]
        if found and found[0].error is not None:
            raise from_data(found[0].error)
        return bool(found)

    # -- the end of a save -------------------------------------------------------------------------------------------

    def _submit(self, save: _Save) -> None:
        if not save.submitted:
            save.submitted = True
            self._commits.submit(lambda: self._commit(save))

    def _commit(self, save: _Save) -> None:
        begin, transaction = save.begin, save.transaction
        number = begin.save
        outcome: dict[str, object]
        try:
            transaction.descend_from(self._newest or begin.parent)
            written = transaction.commit(
                self._before_publish(save), begin.timeout_seconds, verify_attempt if begin.read_back else None
            )
        except BaseException as error:
            transaction.scope.fail(error)
            outcome = {"error": as_data(error)}
        else:
            outcome = self._published(save, written)
        transaction.close()  # before the trainer applies retention: what was read is not deleted
        self._reports.send({"about": "outcome", "save": number, **outcome})
        failed = "error" in outcome
        self._store.empty_trash()
        if failed and not transaction.discard(_STUCK_SECONDS):
            log.warning("step %d: a write of it hangs; its files go once it returns", transaction.step)
            transaction.shards.replace_stuck_threads(_STUCK_SECONDS)
            self._hanging.append(transaction)
        self._hanging = [one for one in self._hanging if not one.discard(0.0)]
        del self._saves[number]
        self._reports.send({"about": "ended", "save": number})

    def _published(self, save: _Save, written: Manifest) -> dict[str, object]:
        transaction = save.transaction
        try:
            self._reuse.learn(written.kind, written.name, transaction.shards.files())
        except Exception:
            log.exception("step %d is durable, but the next save cannot build on it", transaction.step)
        if self._adopted is not None and self._alone.is_set():
            self._newest = written.attempt
            self._adopted.published(written)
        return {
            "attempt": written.attempt,
            "nbytes": written.nbytes,
            "digest": written.file_digest,
            "written_bytes": transaction.written_bytes(written),
            "written_seconds": transaction.written_seconds,
        }

    def _before_publish(self, save: _Save) -> Callable[[], None]:
        def check() -> None:
            if self._ask({"about": "publish", "save": save.begin.save}):
                return
            if self._adopted is None:
                raise SaveAbandoned(f"step {save.transaction.step}: the trainer is gone, and the run was not held")
            self._adopted.before_publish(save.transaction.contents, save.begin.replaces)

        return check

    def _finish_alone(self) -> None:
        """The trainer is gone: publish what is sealed, remove the rest, and give the run back."""
        self._alone.set()
        left = [save for _, save in sorted(self._saves.items())]
        for save in left:
            if not save.sealed:
                save.transaction.scope.fail(
                    SaveAbandoned(f"step {save.transaction.step}: the trainer ended before all of it was staged")
                )
        if self._adopted is not None and any(save.transaction.scope.error is None for save in left):
            self._adopted.go_on()
        for save in left:
            self._submit(save)
        done = threading.Event()
        self._commits.submit(done.set)
        longest = max((save.begin.timeout_seconds for save in left), default=0.0)
        done.wait(longest + 2 * _STUCK_SECONDS)
        if self._adopted is not None:
            self._adopted.give_back()


def _copied() -> None:
    """The trainer sends a unit once its bytes are there."""
