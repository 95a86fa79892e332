"""Takes the shards of one save to the disk: digest, compare with the previous checkpoint, encode, place, write.

A shard whose extents all have the previous checkpoint's content is linked, not written. As long as a shard's extents
match, none of them is written; from the first that differs on, those that matched are copied over from the previous
checkpoint, verified.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from asyncckpt.errors import CheckpointDamaged, SaveAbandoned
from asyncckpt.events import EventBus, ExtentWritten
from asyncckpt.manifest.records import FileRecord, WrittenExtent
from asyncckpt.memory.arena import Arena, StagingBuffer
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import Digest, ShardFormat
from asyncckpt.scope import SaveScope
from asyncckpt.stage.image import Frame, as_it_is, staged_digests
from asyncckpt.stage.staged import StagedUnit
from asyncckpt.stage.units import Unit, neighbours
from asyncckpt.types import SMALL_SHARD_BYTES, ContentDigest, Extent, Layout, StagedDigests
from asyncckpt.write.directory import SaveDirectory
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.progress import EncodedChunk, ShardProgress
from asyncckpt.write.reorder_buffer import ReorderBuffer
from asyncckpt.write.reuse import ReusableFile
from asyncckpt.write.shard_files import ShardFiles
from asyncckpt.write.small_file_queue import SmallFileQueue
from asyncckpt.write.threads import Pools, WriterPool
from asyncckpt.write.unchanged import Unchanged
from asyncckpt.write.written import WrittenFiles


class _Part(NamedTuple):
    """An extent of a unit. ``number``: the extent's in its shard. ``slot``: its part of the unit's slot."""

    number: int
    extent: Extent
    slot: StagingBuffer


class ShardPipeline:
    """Takes staged units from any thread and writes them on the pool's threads. Thread-safe.

    ``scope``: the save's; every error here fails it, and it is notified as extents are done. ``unchanged``: decides
    what is taken over from the checkpoint before. ``directory``: gets the files.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        scope: SaveScope,
        shards: Sequence[ShardProgress],
        unchanged: Unchanged,
        directory: SaveDirectory,
        shard_format: ShardFormat,
        digest: Digest,
        encoder: Encoder,
        pools: Pools,
        arena: Arena,
        events: EventBus,
    ) -> None:
        self._scope = scope
        self._files = ShardFiles(scope, directory, shard_format, digest, encoder.codec)
        self._digest = digest
        self._encoder = encoder
        self._unchanged = unchanged
        self._directory = directory
        self._pools = pools
        self._arena = arena
        self._events = events
        self._lock = threading.Lock()
        self._in_flight = 0
        self._reorder_buffer = ReorderBuffer(self._lock, encoder, arena)
        self.written_bytes = 0
        #: Shards that are not durable yet.
        self.unfinished = sum(bool(shard.extents) for shard in layout.shards)
        self._shards = shards
        self.written = WrittenFiles(shards, unchanged)
        self._small_files = SmallFileQueue(layout, pools, arena)
        scope.when_failed(self._abandon)

    # -- what the save asks ------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Units, and extents copied from the checkpoint before, that a thread may still be working on."""
        return self._in_flight

    def unwritten_bytes(self) -> int:
        """Estimate the bytes that this save will still take from the disk. A shard counts until its blocks are
        reserved, or it is linked or seems about to be."""
        return sum(
            progress.shard.nbytes
            for progress in self._shards
            if progress.writer is None and not progress.finished and not (progress.matching and progress.matched)
        )

    def _abandon(self) -> None:
        """The save has failed: give back what waits for its turn."""
        self._reorder_buffer.abandon(self._shards)
        self._small_files.flush()

    def replace_stuck_threads(self, stuck_seconds: float) -> None:
        """Replace writer threads that have been inside one system call for longer than that, and give the encoder as
        many new buffers as those threads hold."""
        self._encoder.give_up(self._pools.replace_stuck(stuck_seconds))

    def files(self) -> dict[str, ReusableFile]:
        """List the files by name, as the next save compares with them."""
        return {progress.shard.file: progress.known() for progress in self._shards if progress.shard.extents}

    # -- files that several ranks write --------------------------------------------------------------------------------

    @property
    def compared_with(self) -> str:
        """See ``Unchanged.compared_with``."""
        return self._unchanged.compared_with

    @property
    def links_shared(self) -> bool:
        """See ``Unchanged.links_shared``."""
        return self._unchanged.links_shared

    @property
    def damaged(self) -> str:
        """See ``Unchanged.damaged``."""
        return self._unchanged.damaged

    def hear_of_damage(self, name: str) -> None:
        """Note that another rank has found the checkpoint of this name damaged: nothing is taken over from it, and
        retention does not count it."""
        self._unchanged.hear(damaged=name)

    def held_back(self) -> list[str]:
        """List the files of which this rank has a part that has not changed and is not written."""
        return [progress.shard.file for progress in self._shards if progress.held_back]

    def link_shared(self, record: FileRecord) -> bool:
        """Link a file that all ranks which have a part of it hold back; see ``Unchanged.link_shared``. Blocks."""
        return self._unchanged.link_shared(record, self._directory.open())

    def write_held_back(self, files: Collection[str], *, links: bool) -> None:
        """Write this rank's parts of these files after all, out of the checkpoint before: the save is ``unfinished``
        again until they are durable. ``links``: whether such files can be linked at all. Never blocks."""
        self._unchanged.hear(links=links)
        for progress in self._shards:
            if not progress.held_back or progress.shard.file not in files:
                continue
            with self._lock:
                progress.held_back = progress.finished = progress.matching = False
                progress.records, progress.missing = {}, len(progress.shard.extents)
                self.unfinished += 1
            for number in range(len(progress.shard.extents)):
                self._submit(functools.partial(self._copy, progress, number), self._small_files.pool(progress.shard))

    # -- units -------------------------------------------------------------------------------------------------------

    def submit(self, staged: StagedUnit) -> None:
        """Take a staged unit over, with its memory. Never blocks."""
        with self._lock:
            self._in_flight += 1
        shard = self._shards[staged.unit.shard].shard
        self._small_files.submit(shard, staged.slot.nbytes, lambda: self._run(lambda: self._handle(staged)))

    def give_memory_back(self) -> None:
        """Start what waits of any save: whoever waits for memory may wait for the memory of another. Never blocks."""
        self._pools.start_held()

    def _submit(self, work: Callable[[], None], pool: WriterPool) -> None:
        with self._lock:
            self._in_flight += 1
        try:
            pool.submit(lambda: self._run(work))
        except BaseException:
            with self._lock:
                self._in_flight -= 1
            raise

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CheckpointDamaged as error:  # only the previous checkpoint is read here
            step = self._scope.step
            why = f"step {step}: what has not changed was to be taken over, but is damaged since it was written"
            self._scope.fail(CheckpointDamaged(f"{why}: {error}. Save again: everything will be written anew"))
        except BaseException as error:
            self._scope.fail(error)
        finally:
            with self._lock:
                self._in_flight -= 1
            self._scope.notify()

    def _handle(self, staged: StagedUnit) -> None:
        unit, slot = staged.unit, staged.slot
        progress = self._shards[unit.shard]
        owned = True
        try:
            if self._scope.error is None:
                self._unchanged.begin()
                staged.wait_copied()
                parts = [_Part(number - progress.first, extent, own) for number, extent, own in unit.parts(slot)]
                # the digests are of the staged bytes, before anything below this line could spoil them
                found = [staged_digests(self._digest, part.extent, part.slot) for part in parts]
                changed = self._changed(progress, parts, found)
                if isinstance(found[0], ContentDigest):  # a chunk is a unit by itself
                    owned = not changed
                    if changed:
                        self._store_chunk(progress, parts[0].number, parts[0].extent, slot, found[0])
                else:
                    self._write_changed(progress, slot, unit, changed, found)
        finally:
            if owned:
                self._arena.release(slot)

    def _changed(self, progress: ShardProgress, parts: Sequence[_Part], found: Sequence[StagedDigests]) -> list[int]:
        """Return which of these extents have to be written now, by their positions in their unit."""
        changed: list[int] = []
        for at, (part, digests) in enumerate(zip(parts, found, strict=True)):
            self._unchanged.note(progress, part.number, part.extent, part.slot)
            if progress.old is None:
                changed.append(at)
                continue
            here = range(parts[0].number, part.number)
            held, again = self._matches(progress, part.number, digests, here)
            changed += again
            if not held:
                changed.append(at)
        return changed

    def _write_changed(
        self,
        progress: ShardProgress,
        slot: StagingBuffer,
        unit: Unit,
        changed: Sequence[int],
        found: Sequence[StagedDigests],
    ) -> None:
        """Write these extents of a unit, all that are neighbours at once."""
        first = unit.first - progress.first
        for run in neighbours(changed):
            records: list[WrittenExtent] = []
            for at in run:
                extent, digests = unit.extents[at], found[at]
                assert not isinstance(digests, ContentDigest)
                stored = extent.payload_bytes if extent.payload_bytes != extent.nbytes else 0
                records.append(WrittenExtent(extent.offset, extent.nbytes, digests, None, stored))
            begin = unit.places[run[0]] + unit.extents[run[0]].block_offset
            self._write(progress, slot.view[begin:], records, first + run[0])

    def _matches(
        self, progress: ShardProgress, number: int, found: StagedDigests, here: Collection[int] = ()
    ) -> tuple[bool, list[int]]:
        """Say whether nothing of an extent has to be written for now, because the previous checkpoint has these bytes.
        Where it turns out that extents which matched before it have to be written after all, those among ``here``,
        which are staged still, are returned by their positions in it; the others are copied."""
        verdict = self._unchanged.compare(progress, number, found, self._lock, self._directory)
        if verdict.linked:
            self._done(progress)
        # encoding waits for a buffer, and only writing threads give buffers back: they must not wait there themselves
        encodes = self._unchanged.differs and progress.shard.packed_on_write
        pool = self._pools.encoding if encodes else self._small_files.pool(progress.shard)
        again: list[int] = []
        for copied in verdict.copies:
            if copied in here:
                again.append(copied - min(here))
            else:
                self._submit(functools.partial(self._copy, progress, copied), pool)
        return verdict.held, sorted(again)

    def _store_chunk(
        self, progress: ShardProgress, number: int, extent: Extent, slot: StagingBuffer, found: ContentDigest
    ) -> None:
        """Encode a chunk if that pays, and write it. Takes the slot over."""
        if self._unchanged.differs or self._encoder.wanted(extent):
            work = functools.partial(self._encode, progress, number, extent, slot, found)
            self._submit(work, self._pools.encoding)
        else:
            self._write_all(
                progress,
                self._reorder_buffer.place(progress, EncodedChunk(number, slot, as_it_is(extent, slot), found)),
            )

    def _encode(
        self, progress: ShardProgress, number: int, extent: Extent, slot: StagingBuffer, found: ContentDigest
    ) -> None:
        try:
            if self._scope.error is not None:
                raise SaveAbandoned(f"step {self._scope.step}: given up before all of it was encoded")
            frame = self._frame(progress, number, extent, slot)
        except BaseException:
            self._arena.release(slot)
            raise
        for placed in self._reorder_buffer.place(progress, EncodedChunk(number, slot, frame, found)):
            self._submit(
                functools.partial(self._write_placed, progress, *placed), self._small_files.pool(progress.shard)
            )

    def _frame(self, progress: ShardProgress, number: int, extent: Extent, slot: StagingBuffer) -> Frame:
        layers = self._unchanged.layers_of(progress, self._directory)
        if layers:
            self._unchanged.subtract(progress, number, extent, slot)
        frame = self._encoder.encode(extent, slot)
        frame.unchanged = frame.unchanged and not layers
        return frame

    def _write_all(self, progress: ShardProgress, placed: Sequence[tuple[EncodedChunk, int]]) -> None:
        """Write the first frame on this thread, and submit the others to the pool."""
        for later in placed[1:]:
            self._submit(
                functools.partial(self._write_placed, progress, *later), self._small_files.pool(progress.shard)
            )
        for item, offset in placed[:1]:
            self._write_placed(progress, item, offset)

    def _write_placed(self, progress: ShardProgress, item: EncodedChunk, offset: int) -> None:
        frame = item.frame
        try:
            if self._scope.error is not None:
                return
            nbytes = frame.payload_bytes if progress.alone else padded(frame.payload_bytes)
            # a chunk stored as it is has been digested already
            known = frame.unchanged and nbytes == padded(frame.payload_bytes)
            digest = item.content.hex if known else self._digest(frame.view[:nbytes])
            record = WrittenExtent(offset, nbytes, (digest,), item.content, frame.payload_bytes)
            self._write(progress, frame.view, [record], item.number)
        finally:
            self._reorder_buffer.release(item)

    def _write(self, progress: ShardProgress, view: memoryview, records: Sequence[WrittenExtent], number: int) -> None:
        """Write extents from ``number`` on, which lie side by side in ``view`` as they do in the file."""
        began = time.perf_counter()
        writer = self._files.writer(progress)
        nbytes = sum(record.nbytes for record in records)
        with self._encoder.auto_compression.timing_write(nbytes):
            writer.write_at(view, nbytes, records[0].offset)
        now = time.perf_counter()
        self._events.emit(ExtentWritten(step=self._scope.step, at_seconds=now, nbytes=nbytes, seconds=now - began))
        with self._lock:
            progress.records.update(enumerate(records, number))
            progress.missing -= len(records)
            self.written_bytes += nbytes
            complete = progress.missing == 0
        if not complete or self._scope.error is not None:
            return
        if self.unfinished > 1 and progress.shard.nbytes > SMALL_SHARD_BYTES:  # this thread has other files to write
            with contextlib.suppress(RuntimeError):  # no thread can be had
                self._submit(functools.partial(self._finish, progress), self._pools.small)
                return
        self._finish(progress)

    def _copy(self, progress: ShardProgress, number: int) -> None:
        """Write an extent out of the previous checkpoint, verified: the extent matched, but its shard did not."""
        if self._scope.error is not None or progress.old is None:
            return
        content = progress.old.ordered[number].content
        if content is None:
            view, record = self._unchanged.bytes_of(progress, number)
            self._write(progress, view, [record], number)
            return
        if self._unchanged.differs:  # decode, then encode against the layers it has now
            extent = progress.shard.extents[number]
            frame = self._frame(progress, number, extent, self._unchanged.image_of(progress, number))
        else:
            buffer, old = self._unchanged.bytes_of(progress, number)
            frame = Frame(buffer, old.payload_bytes, None)
        self._write_all(progress, self._reorder_buffer.place(progress, EncodedChunk(number, None, frame, content)))

    # -- shards ------------------------------------------------------------------------------------------------------

    def _finish(self, progress: ShardProgress) -> None:
        self._files.finish(progress)
        self._done(progress)

    def _done(self, progress: ShardProgress) -> None:
        with self._lock:
            progress.finished = True
            self.unfinished -= 1
        self._small_files.done(progress.shard)
