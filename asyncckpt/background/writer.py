"""The background writer of a checkpointer: it has a process that writes, replaces one that died, and makes saves."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from asyncckpt.background.messages import Answer, Begin, Hello, LayoutMade, PassedLease, RegionShared
from asyncckpt.background.process import BackgroundProcess
from asyncckpt.background.save import BackgroundSave
from asyncckpt.catalog.quarantine import Quarantine
from asyncckpt.catalog.steps import StepRegistry
from asyncckpt.errors import AsyncCkptError
from asyncckpt.events import EventBus, ExtentWritten, Written
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.records import Manifest
from asyncckpt.memory.arena import Arena
from asyncckpt.protocols import Codec
from asyncckpt.scope import SaveScope
from asyncckpt.storage.lease import HeldLease, Lease
from asyncckpt.storage.local import TEMP_PREFIX, LocalStore
from asyncckpt.types import Layout
from asyncckpt.write.options import WriterOptions
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.threads import WriterPool

log = logging.getLogger("asyncckpt")

#: A process that does not serve after so long is not waited for: threads write instead.
_START_SECONDS = 30.0
#: The events of the process, which are emitted here.
_EVENTS = {"Written": Written, "ExtentWritten": ExtentWritten}


class BackgroundWriter:
    """Makes saves that a background process writes. ``start`` and ``save`` are for the training thread.

    ``prune``: applies retention where the storage is full. ``arena``: is shared.
    """

    def __init__(
        self,
        *,
        store: LocalStore,
        lease: HeldLease,
        codec: Codec,
        chain: int,
        options: WriterOptions,
        arena: Arena,
        reuse: ReuseSource,
        quarantine: Quarantine,
        steps: StepRegistry,
        events: EventBus,
        prune: Callable[[], object],
    ) -> None:
        self.arena = arena
        #: Waits for copies that a device makes, and hands over what they bring.
        self.handing_over = WriterPool(1, "asyncckpt-hand-over")
        self._store = store
        self._lease = lease
        self._codec = codec
        self._chain = chain
        self._options = options
        self._reuse = reuse
        self._quarantine = quarantine
        self._steps = steps
        self._events = events
        self._prune = prune
        self._pruning = WriterPool(1, "asyncckpt-pruner")
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._saves: dict[int, BackgroundSave] = {}
        self._process: BackgroundProcess | None = None
        self._sent_regions: set[int] = set()
        self._sent_layout: tuple[int, Layout] | None = None
        #: Whether a process could not be started: threads write from then on.
        self.failed = False

    def start(self) -> None:
        """Start the process, unless there is one. Does not wait for it."""
        if self._process is not None or self.failed:
            return
        hold = self._lease.hold
        passed, descriptors = None, []
        if isinstance(hold, Lease):
            passed, descriptors = PassedLease(hold.directory, hold.owner, hold.options), [hold.lock]
        hello = Hello(
            self._store.path, self._store.direct, self._options.threads, self._codec, self._reuse.names(), passed
        )
        with self._lock:
            self._sent_regions, self._sent_layout = set(), None
        self._process = BackgroundProcess(hello, descriptors, self._hear, self._died)

    def replace(self, process: BackgroundProcess) -> None:
        """Kill a process that does nothing any more. The next save starts another one; those of this one fail once it
        is gone. Does not block."""
        if self._process is process:
            self._process = None
        process.kill()

    def save(self, contents: Contents, scope: SaveScope, started_seconds: float) -> BackgroundSave | None:
        """Make a save that the process writes; None where no process can be had. Blocks until the first one serves."""
        self.start()
        process = self._process
        if process is None or not process.wait_ready(_START_SECONDS):
            self._give_up_processes("it does not come to serve")
            return None
        number = next(self._numbers)

        def begin(bare: Contents) -> Begin:
            layout = self._sent_layout
            assert layout is not None
            draft = bare.draft
            return Begin(
                number,
                layout[0],
                bare,
                self._options.reuse_unchanged,
                self._chain,
                started_seconds,
                self._quarantine.names(),
                self._steps.parent_of(draft.sequence),
                self.replaced_by(bare),
                self._options.durable_timeout_seconds,
                self._options.read_back,
            )

        save = BackgroundSave(self, process, number, contents, scope, begin, started_seconds)
        with self._lock:
            self._saves[number] = save
        save.follow()
        if process.is_gone:  # it died meanwhile, and was not told of this save
            save.process_died("it is gone")
        return save

    def _give_up_processes(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            log.warning("no background process can be had (%s): threads of the trainer write", reason)

    def close(self) -> None:
        """Have the process end, and wait for that. Idempotent; in a forked child it is not called."""
        process = self._process
        self._process = None
        self.failed = True
        if process is not None:
            process.close()
            process.wait_gone()
        for pool in (self.handing_over, self._pruning):
            pool.close()

    # -- what saves need ---------------------------------------------------------------------------------------------

    def send_layout(self, process: BackgroundProcess, layout: Layout) -> None:
        """Make sure that the process knows the layout of the save that begins."""
        with self._lock:
            if self._sent_layout is not None and self._sent_layout[1] is layout:
                return
            number = self._sent_layout[0] + 1 if self._sent_layout is not None else 1
            self._sent_layout = number, layout
            process.send(LayoutMade(number, Layout(layout.shards, layout.nbytes, layout.fingerprint)))

    def send_region(self, process: BackgroundProcess, region: int) -> None:
        """Make sure that the process has a region of the arena mapped."""
        with self._lock:
            if region in self._sent_regions:
                return
            self._sent_regions.add(region)
            fd, nbytes = self.arena.descriptor(region)
            process.send(RegionShared(region, nbytes, self.arena.budget_bytes), [fd])

    def replaced_by(self, contents: Contents) -> Sequence[str]:
        """Return the checkpoints that make way for this one."""
        draft = contents.draft
        return self._steps.replaced_by(draft.step, draft.kind, draft.sequence)

    def published(self, contents: Contents) -> Manifest | None:
        """Return the manifest of a save that a process which is gone had published, once that is durable; None where it
        had not. Blocks on the disk."""
        try:
            self._store.ops.fsync_directory(self._store.path)
            reader = self._store.open(contents.draft.name)
            try:
                found = manifests.load(reader)
            finally:
                reader.close()
        except (AsyncCkptError, OSError):
            return None
        return found if found.attempt == contents.draft.attempt else None

    def remove_attempt(self, contents: Contents) -> None:
        """Remove what a process that is gone has left of a save. Blocks on the disk; never raises."""
        draft = contents.draft
        path = os.path.join(self._store.path, f"{TEMP_PREFIX}{draft.step:08d}-{draft.attempt}")
        if os.path.isdir(path):
            self._store.delete_tree(path)

    # -- what the process reports ------------------------------------------------------------------------------------

    def _hear(self, message: dict[str, Any]) -> None:
        match message["about"]:
            case "progress":
                for number, index in message["units"]:
                    if (save := self._saves.get(number)) is not None:
                        save.shards.written(index)
                for event in message["events"]:
                    self._events.emit(_EVENTS[event.pop("class")](**event))
            case "prune":
                process = self._process
                if process is not None:
                    self._pruning.submit(lambda: self._prune_for(process, message["call"]))
            case "damaged":
                self._quarantine.add(message["name"])
            case "log":
                log.log(message["level"], "%s", message["text"])
            case about:
                save = self._saves.get(message["save"])
                if save is not None:
                    save.hear(message)
                if about == "ended":
                    with self._lock:
                        self._saves.pop(message["save"], None)

    def _prune_for(self, process: BackgroundProcess, call: int) -> None:
        with contextlib.suppress(Exception):  # there is no more room then, which the save says
            self._prune()
        process.send(Answer(call))

    def _died(self, process: BackgroundProcess, reason: str) -> None:
        if self._process is process:
            self._process = None
        with self._lock:
            saves = {number: save for number, save in self._saves.items() if save.process is process}
            for number in saves:
                del self._saves[number]
        if reason:
            log.warning("the background process is gone (%s); the next save starts another one", reason)
        for save in saves.values():
            save.process_died(reason or "it was told to end")
        if reason and not process.was_ready:
            self._give_up_processes(reason)
