"""A save whose units the trainer hands over, and that its background process writes and publishes."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from asyncckpt.background.failures import as_data, from_data
from asyncckpt.background.messages import Answer, Begin, Broken, Commit, MemoryShort, ReplaceStuck, Sealed
from asyncckpt.background.wire import HandedUnit
from asyncckpt.errors import SaveFailed
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.protocols import PendingDirectory
from asyncckpt.scope import SaveScope
from asyncckpt.stage.staged import StagedUnit
from asyncckpt.types import Layout

if TYPE_CHECKING:
    from asyncckpt.background.process import BackgroundProcess
    from asyncckpt.background.writer import BackgroundWriter

log = logging.getLogger("asyncckpt")

#: A process that has not reported the end of a save so long after its deadline hangs.
_SILENCE_SECONDS = 3.0
#: How long the trainer waits at most for the process to tidy up.
_TIDY_SECONDS = 30.0

_NO_LAYOUT = Layout((), 0, "")


class BackgroundSave:
    """One save, in the trainer. It is to the committer and the stager what a ``SaveTransaction`` is. Thread-safe.

    ``number``: the save's among those of the process. ``begin``: what the process is told of it.
    """

    def __init__(
        self,
        writer: BackgroundWriter,
        process: BackgroundProcess,
        number: int,
        contents: Contents,
        scope: SaveScope,
        begin: Callable[[Contents], Begin],
        started_seconds: float,
    ) -> None:
        self.contents = contents
        self.scope = scope
        self.step = scope.step
        self.started_seconds = self.written_seconds = started_seconds
        self.number = number
        self._writer = writer
        self.process = process
        self._begin = begin
        self._written_bytes = 0
        #: What the process reports of the end of this save; None: the save has failed here.
        self._inbox: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._ended = threading.Event()
        self._allowed = False
        self.shards = HandedOver(self, process, writer, contents.layout, scope)

    def follow(self) -> None:
        """Have the process hear what becomes of the save in the trainer."""
        self.scope.when_failed(self._broken)
        self.scope.when_judged(self.shards.seal)

    def say_begin(self) -> None:
        """Tell the process of this save."""
        self._writer.send_layout(self.process, self.contents.layout)
        contents = replace(self.contents, layout=_NO_LAYOUT)
        self.process.send(self._begin(contents))

    def _broken(self) -> None:
        error = self.scope.error
        if error is not None and self.shards.give_up():
            self.process.send(Broken(self.number, as_data(error)))
        self._inbox.put(None)

    # -- what the process reports ------------------------------------------------------------------------------------

    def hear(self, message: dict[str, Any]) -> None:
        """Take a report of the process in. Never blocks."""
        match message["about"]:
            case "failed":
                self.scope.fail(from_data(message["error"]))
            case "ended":
                self._ended.set()
                self.shards.end()
            case _:
                self._inbox.put(message)

    def process_died(self, reason: str) -> None:
        """Note that the process is gone, and that nobody writes what it was writing."""
        self._ended.set()
        self._inbox.put({"about": "died", "reason": reason})
        if not self._allowed:
            self.scope.fail(self._lost(reason))
        self.shards.end()

    def _lost(self, reason: str) -> SaveFailed:
        return SaveFailed(
            f"step {self.step}: the background process is gone ({reason}) before this save was durable. Nothing was "
            f"published; earlier checkpoints are untouched. The next save starts another one; if that dies too, look "
            f"at the machine's memory, or save with WriterOptions(process='never')"
        )

    # -- what the committer asks -------------------------------------------------------------------------------------

    def written_bytes(self, _written: Manifest) -> int:
        """Return how many bytes of a durable checkpoint were written."""
        return self._written_bytes

    def descend_from(self, attempt: str) -> None:
        """See ``SaveTransaction.descend_from``."""
        self.contents = replace(self.contents, draft=replace(self.contents.draft, parent=attempt))

    def commit(
        self,
        check_lease: Callable[[], None],
        timeout_seconds: float,
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest:
        """Have the process publish the save, and wait until it has. Blocks; what the returned manifest is of is
        durable. It lists no files. Raises what made the save fail."""
        self.shards.begin()
        self.shards.seal()
        self.scope.raise_if_failed()
        draft = self.contents.draft
        self.process.send(Commit(self.number, draft.parent, self._writer.replaced_by(self.contents)))
        gives_up_at = self.started_seconds + timeout_seconds + _SILENCE_SECONDS
        while True:
            message = self._next(gives_up_at)
            if message is None:
                if not self._allowed:
                    self.scope.raise_if_failed()
            elif message["about"] == "publish":
                self._allow(message["call"], check_lease)
            elif message["about"] == "died":
                return self._look_after_death(message["reason"])
            elif "error" in message:
                error = from_data(message["error"])
                self.scope.fail(error)
                raise error
            else:
                return self._published(message)

    def _next(self, gives_up_at: float) -> dict[str, Any] | None:
        """Return what the process reports next. One that reports nothing for so long does nothing any more: it would
        have given the save up by itself. It is killed, and that it is gone is reported then."""
        with contextlib.suppress(Empty):
            return self._inbox.get(timeout=max(0.0, gives_up_at - time.perf_counter()))
        log.warning("step %d: the background process hangs; it is killed", self.step)
        self._writer.replace(self.process)
        return self._inbox.get()

    def _allow(self, call: int, check_lease: Callable[[], None]) -> None:
        try:
            self.scope.raise_if_failed()
            check_lease()
            self.scope.begin_publish()
            self._allowed = True
        except BaseException as error:
            self.process.send(Answer(call, as_data(error)))
            self.scope.fail(error)
            raise
        self.process.send(Answer(call))

    def _published(self, outcome: dict[str, Any]) -> Manifest:
        self._written_bytes = outcome["written_bytes"]
        self.written_seconds = outcome["written_seconds"]
        return replace(
            self.contents.draft,
            files=(FileRecord(self.contents.draft.name, outcome["nbytes"], ()),),
            file_digest=outcome["digest"],
        )

    def _look_after_death(self, reason: str) -> Manifest:
        """Find out whether the process, which is gone, had published the save. Blocks on the disk."""
        found = self._writer.published(self.contents) if self._allowed else None
        if found is None:
            error = self._lost(reason)
            self.scope.fail(error)
            raise error
        self._written_bytes = found.nbytes
        self.written_seconds = time.perf_counter()
        return found

    def discard(self, timeout_seconds: float) -> bool:
        """Wait until the process has removed the failed attempt; False where it has not after ``timeout_seconds``."""
        if not self.shards.begun:
            return True
        if not self._ended.wait(timeout_seconds):
            return False
        if self.process.is_gone:
            self._writer.remove_attempt(self.contents)
        return True

    def close(self) -> None:
        """See ``SaveTransaction.close``. Waits until the process has tidied up after a durable save, as retention comes
        next."""
        if self.scope.error is None:
            self._ended.wait(_TIDY_SECONDS)
        self.scope.end()


class HandedOver:
    """Hands the units of one save over to the process, and gives their memory back once it has written them.
    Thread-safe."""

    def __init__(
        self,
        save: BackgroundSave,
        process: BackgroundProcess,
        writer: BackgroundWriter,
        layout: Layout,
        scope: SaveScope,
    ) -> None:
        self._save = save
        self._process = process
        self._writer = writer
        self._arena = writer.arena
        self._scope = scope
        self._layout = layout
        self._left = sum(len(shard.extents) for shard in layout.shards)
        self._maker = threading.get_ident()
        self._lock = threading.Lock()
        self._sending = threading.RLock()
        self._waiting: list[HandedUnit] = []
        self._slots: dict[int, StagingBuffer] = {}
        self._over = False
        self._sealed = False
        #: Whether the process knows of the save.
        self.begun = False

    def submit(self, staged: StagedUnit) -> None:
        """Hand a unit over. Blocks only where the process takes nothing, and never on a device: where copies are
        queued, a thread waits for them."""
        if staged.slot.copies:
            self._writer.handing_over.submit(functools.partial(self._hand_over, staged))
        else:
            self._hand_over(staged)

    def _hand_over(self, staged: StagedUnit) -> None:
        slot, first, count = staged.slot, staged.unit.first, len(staged.unit.extents)
        try:
            if self._scope.error is None:
                staged.wait_copied()
        except BaseException as error:
            self._scope.fail(error)
        with self._lock:
            dropped = self._over or self._scope.error is not None
            if not dropped:
                self._slots[first] = slot
                waiting = self._arena.waiting
                place = slot.region, slot.split, waiting, slot.offset, slot.nbytes
                self._waiting.append(HandedUnit(self._save.number, first, count, *place))
            self._left -= count
            last = self._left == 0
        if dropped:
            self._arena.release(slot)
        elif last or self.begun or threading.get_ident() != self._maker:
            self.begin()
            if last:
                self.seal()

    def begin(self) -> None:
        """Tell the process of the save, the first time, and send what waits. Blocks where the process takes nothing."""
        with self._sending:
            if not self.begun:
                if self._scope.error is not None:
                    return
                try:
                    self._save.say_begin()
                except Exception as error:
                    self._scope.fail(error)
                    return
                self.begun = True
            with self._lock:
                units, self._waiting = self._waiting, []
            for unit in units:
                self._writer.send_region(self._process, unit.region)
            if units:
                self._process.send_units(units)

    def seal(self) -> None:
        """Tell the process that it has all of the save, if it has, and if nothing has to be found out before it may be
        published."""
        if self._left or not self._scope.judged:
            return
        with self._sending:
            if self._scope.error is None and not self._sealed:
                self._sealed = True
                self.begin()
                self._process.send(Sealed(self._save.number))

    def give_up(self) -> bool:
        """The save has failed: give back what the process does not know of. Returns whether it knows of the save."""
        with self._sending:
            if self.begun:
                return True
        self.end()
        return False

    def give_memory_back(self) -> None:
        """Have the process write what it has put off: somebody waits for staging memory."""
        self._process.send(MemoryShort(self._arena.waiting))

    def written(self, first: int) -> None:
        """Note that the process has no use any more for the memory of the unit that begins with this extent."""
        with self._lock:
            slot = self._slots.pop(first, None)
        if slot is not None:
            self._arena.release(slot)

    def end(self) -> None:
        """Give all memory back: the process has ended the save, or is gone."""
        with self._lock:
            self._over = True
            slots, self._slots = self._slots, {}
            self._waiting = []
        for slot in slots.values():
            self._arena.release(slot)

    def unwritten_bytes(self) -> int:
        """Estimate the bytes that this save will still take from the disk."""
        return 0 if self._over else self._layout.nbytes

    def files(self) -> None:
        """Return None: the process alone knows what the files are like."""

    def replace_stuck_threads(self, stuck_seconds: float) -> None:
        """See ``ShardPipeline.replace_stuck_threads``."""
        self._process.send(ReplaceStuck(self._save.number, stuck_seconds))
