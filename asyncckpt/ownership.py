"""``RunOwnership`` makes one process, or all ranks of one job, the only writer of a run directory."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace

from asyncckpt import formats, interrupts
from asyncckpt.catalog import names as naming
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.journal import Journal
from asyncckpt.catalog.listing import CheckpointInfo, Listing, newest_of
from asyncckpt.codecs import codecs
from asyncckpt.commit.publication import take_over
from asyncckpt.errors import CheckpointerClosed, InvalidOption, RunLocked, SaveAbandoned, storage_errors
from asyncckpt.events import EventBus
from asyncckpt.formats.options import Files
from asyncckpt.protocols import Capability, Hold, Store
from asyncckpt.ranks.coordinator import Coordinator, Known, RestoreStages
from asyncckpt.ranks.planner import JobPlanner
from asyncckpt.ranks.store import RankOptions, RankStore
from asyncckpt.restore.carrying_out import Stages
from asyncckpt.run import Run
from asyncckpt.storage.lease import HeldLease, boot_id
from asyncckpt.storage.local import LocalStore
from asyncckpt.types import LayoutOptions, LeaseOptions

log = logging.getLogger("asyncckpt")

#: The run that this process has opened last, by address.
_open_here: dict[str, weakref.ref[RunOwnership]] = {}


def check_kinds(**options: tuple[object, type]) -> None:
    """Raise ``InvalidOption`` for an option whose value is not of its type. ``options``: by name, value and type."""
    for name, (given, kind) in options.items():
        if not isinstance(given, kind):
            raise InvalidOption(f"{name} must be {kind.__name__}(...), not {given!r:.80}")


def check_kinds_or_none(**options: tuple[object, type]) -> None:
    """Do what ``check_kinds`` does, where None is a value, too."""
    check_kinds(**{name: option for name, option in options.items() if option[0] is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Says how a run directory is taken, and how checkpoints are named.

    ``name``: the template of the checkpoints' directories, with ``{step}``, ``{epoch}`` and other metrics as fields.
    ``create_parents``: make the parents of the run directory, not its last part alone. ``overwrite``: saving a step
    again replaces it. ``takeover``: cut off a run that holds the directory and cannot be reached. ``lease``: how this
    run shows that it is alive. ``store``: a storage backend of your own, used instead of the one that the path names
    (a double in tests, say); ``direct`` of ``WriterOptions`` does not reach it. ``journal``: keep a line for each save,
    restore and deletion beside the checkpoints, of 2 MiB at most, for ``asyncckpt report`` (a directory alone can have
    one). Raises ``InvalidOption``."""

    name: str = naming.DEFAULT
    create_parents: bool = False
    overwrite: bool = False
    takeover: bool = False
    lease: LeaseOptions = field(default_factory=LeaseOptions)
    store: Store | None = None
    journal: bool = True

    def __post_init__(self) -> None:
        naming.NameTemplate(self.name)


class RunOwnership(Run):
    """Opens a run for writing, and gives it back. In a job, rank 0 alone holds the lease. For the training thread."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        direct: bool,
        events: EventBus,
        options: RunOptions,
        ranks: RankOptions | None,
        files: Files,
        layout: LayoutOptions,
        patience_seconds: float,
    ) -> None:
        super().__init__(path, direct=direct, events=events, store=options.store)
        self._run_options = options
        self._rank_options = ranks
        self._files = files
        self._layout_options = layout
        self._patience_seconds = patience_seconds
        self._acquiring: Future[tuple[Hold, Listing]] | None = None
        #: What the directory held when it was taken, for the restore that follows at once.
        self._found: Listing | None = None
        self._held = HeldLease()
        local = isinstance(self._store, LocalStore)
        #: Whoever leads notes in it what happens to the run; a bucket has none.
        self._journal = Journal(self._store.address) if local and options.journal else None
        self._coordinator: Coordinator | None = None
        self._opened = False
        self._closed = False
        #: Whether a ``with`` block of this run goes on: then it is in use, and gives way to nobody.
        self._entered = False
        self._gave_way = False
        self._thread = threading.get_ident()
        self._pid = os.getpid()

    def _open(self, *, to_restore: bool = False) -> None:
        """Become the directory's writer and learn what is there. Does nothing the second time. Blocks; see
        ``Checkpointer.prepare``. ``to_restore``: the caller restores next, and calls ``_close_found`` in the end."""
        self._check_process()
        if self._opened:
            return
        self._check_usable()
        self._replace_earlier()
        self._join()
        try:
            if self._coordinator is None:
                found = list(map(Known.of, self._acquire_after_dropped()[1]))
            else:
                found = self._coordinator.open(self._store, self._acquire_after_dropped)
            self._learn(found)
            self._opened = True
            _open_here[self._store.address] = weakref.ref(self)
        except BaseException:
            self._close_found()
            raise
        if not to_restore:
            self._close_found()

    def _replace_earlier(self) -> None:
        """Close a run that the same thread of this process has opened before in this directory, as a notebook does when
        a cell is run again: its saves end first. One inside a ``with`` block is in use, and stays."""
        reference = _open_here.get(self._store.address)
        earlier = reference() if reference is not None else None
        if earlier is None or earlier._closed or earlier._entered or self._run_options.takeover:
            return
        if (earlier._pid, earlier._thread) == (self._pid, self._thread):
            log.warning("%s: an earlier Checkpointer of this process is closed; this one takes over", self.path)
            earlier._gave_way = True
            try:
                earlier._end(self._patience_seconds)
            except Exception as error:
                log.error("%s: closing the earlier one failed: %s", self.path, error)

    def _end(self, timeout: float | None) -> None:
        """Close the run. Saves that are not durable after ``timeout`` seconds are given up."""

    def _close_found(self) -> None:
        """Close what was found when the directory was taken: nothing is restored from it any more."""
        if self._found is not None:
            self._found.close()
            self._found = None

    def _learn(self, found: list[Known]) -> None:
        """Called with what the directory held when it was taken, the oldest save first."""

    def _join(self) -> None:
        """Find the other ranks of the job, if there are any; once."""
        if self._coordinator is None and self._rank_options is not None:
            ranks = RankStore.of_job(self.path, self._rank_options)
            if ranks is not None:
                layout = self._layout_options
                if Capability.SHARED_FILES not in self._store.capabilities and layout.by_rank is None:
                    layout = replace(layout, by_rank=True)
                if Capability.SHARED_FILES not in self._store.capabilities and not layout.by_rank:
                    raise InvalidOption(
                        f"{self.path}: this storage has no files that several ranks write into. Let each rank write "
                        f"its own: files=Safetensors(codec='none'), per_rank unset or True"
                    )
                shard_format, codec = formats.get(self._files.format), codecs.get(self._files.codec)
                self._coordinator = Coordinator(ranks, JobPlanner(ranks, shard_format, codec, layout))

    def _acquire_after_dropped(self) -> tuple[str, list[CheckpointInfo]]:
        """Take the lease. Where a run of this process that nobody has any more still holds it, because a save of it is
        in flight, waits for that."""
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                return self._acquire()
            except RunLocked:
                reference, holder = _open_here.get(self._store.address), self._store.holder()
                was_dropped = reference is not None and reference() is None
                ours = holder is not None and (holder.pid, holder.boot) == (self._pid, boot_id())
                if not (was_dropped and ours) or time.monotonic() > deadline:
                    raise
                time.sleep(interrupts.SLICE_SECONDS)
                interrupts.deliver()

    def _acquire(self) -> tuple[str, list[CheckpointInfo]]:
        """Take the lease and remove leftovers; return the lease's owner and the checkpoints that are there, which
        ``_found`` holds too. Raises ``SaveAbandoned`` where the storage does not answer in time; the next call goes on
        waiting for that answer."""
        if self._acquiring is None:
            acquiring = self._acquiring = Future()
            # a call to hung storage may never come back, and training has to
            threading.Thread(
                target=self._take_directory, args=(acquiring,), name="asyncckpt-opening", daemon=True
            ).start()
        acquiring = self._acquiring
        if not interrupts.wait_for(lambda seconds: bool(wait([acquiring], seconds)[0]), self._patience_seconds):
            raise SaveAbandoned(
                f"{self.path}: the storage has not answered for {self._patience_seconds:.0f} s. Check it and save "
                f"again, or train into another directory"
            )
        taken, self._acquiring = self._acquiring, None
        hold, self._found = taken.result()
        self._held.hold = hold
        return hold.owner, self._found.entries

    def _take_directory(self, acquiring: Future[tuple[Hold, Listing]]) -> None:
        options = self._run_options
        hold: Hold | None = None
        try:
            with storage_errors(self.path):
                hold = take_over(
                    self._store,
                    create_parents=options.create_parents,
                    takeover=options.takeover,
                    options=options.lease,
                )
                acquiring.set_result((hold, Catalog(self._store, self.path).listing(newest_of("full"))))
        except BaseException as error:
            if hold is not None:
                hold.release()
            acquiring.set_exception(error)

    def _release(self) -> None:
        """Give the directory back; in a job, after the other ranks have learnt how the last save ended."""
        if self._opened and self._coordinator is not None:
            self._coordinator.close()
        if self._held.hold is not None:
            self._held.hold.release()
        if self._acquiring is not None:  # nobody waits for it any more
            self._acquiring.add_done_callback(_give_back)

    def _check_usable(self) -> None:
        if self._closed:
            if self._gave_way:
                raise CheckpointerClosed(f"{self.path}: a newer Checkpointer of this process took over; use that one")
            raise CheckpointerClosed(f"{self.path}: this Checkpointer is closed; make a new one")
        self._check_process()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointerClosed(f"{self.path}: made in process {self._pid}; make a Checkpointer in this one")

    # -- restoring together ------------------------------------------------------------------------------------------

    def _before_restore(self) -> None:
        self._check_process()
        self._join()

    def _stages(self) -> Stages:
        return RestoreStages(self._coordinator) if self._coordinator is not None else super()._stages()

    def _candidates(self) -> Listing:
        def look() -> Listing:
            listing, self._found = self._found or super(RunOwnership, self)._candidates(), None
            return listing

        return look() if self._coordinator is None else self._shared(self._coordinator, None, look)

    def _find(self, step: int | str | None, kind: str | None) -> Listing:
        def look() -> Listing:
            return super(RunOwnership, self)._find(step, kind)

        return look() if self._coordinator is None else self._shared(self._coordinator, step, look)

    def _shared(self, coordinator: Coordinator, asked: int | str | None, look: Callable[[], Listing]) -> Listing:
        """Have rank 0 look, and return what it has found on every rank."""
        with coordinator.together("look for a checkpoint"):
            listing = look() if coordinator.leads else None
        try:
            return coordinator.share_listing(listing, asked, self._store)
        except BaseException:
            if listing is not None:
                listing.close()
            raise

    def _is_gone(self, entry: CheckpointInfo) -> bool:
        gone = super()._is_gone(entry)
        return self._coordinator.any_rank("gone", gone) if self._coordinator is not None else gone


def _give_back(taken: Future[tuple[Hold, Listing]]) -> None:
    if taken.exception() is None:
        lease, found = taken.result()
        found.close()
        lease.release()
