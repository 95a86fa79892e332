"""The shards of one save on their way to disk: digest, compare with the previous checkpoint, encode, place, write.

A shard whose extents all have the previous checkpoint's content is linked, not written. As long as a shard's extents
match, none of them is written; from the first that differs on, those that matched are copied over from the previous
checkpoint, verified.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asyncckpt.arena import Arena, Slot, aligned_buffer
from asyncckpt.encoder import Encoder, Frame, as_it_is, content, padded
from asyncckpt.errors import CheckpointDamaged, SaveAbandoned
from asyncckpt.events import EventBus, ExtentWritten
from asyncckpt.formats import chunks
from asyncckpt.previous import KnownFile, Previous
from asyncckpt.protocols import Attempt, Digest, Extent, Layout, Placed, Shard, ShardFormat, ShardWriter, TensorSpec
from asyncckpt.records import ExtentRecord, FileRecord
from asyncckpt.staging import Ready
from asyncckpt.writer import WriterPool


@dataclass(slots=True)
class _Parked:
    number: int
    slot: Slot | None
    frame: Frame
    content: str


@dataclass(slots=True)
class _Progress:
    """One shard. ``records`` are its extents by number, ``places`` likewise where they were placed while written."""

    shard: Shard
    first: int
    missing: int
    cursor: int
    old: KnownFile | None = None
    writer: ShardWriter | None = None
    matched: list[int] = field(default_factory=list)
    matching: bool = False
    linked: bool = False
    finished: bool = False
    turn: int = 0
    parked: dict[int, _Parked] = field(default_factory=dict)
    records: dict[int, ExtentRecord] = field(default_factory=dict)
    edges: list[ExtentRecord] = field(default_factory=list)
    nbytes: int = 0


def specs_of(shard: Shard) -> list[TensorSpec]:
    """The tensors that a shard holds, whole or in part."""
    return [placement.spec for placement in shard.placements] + [run.tensor.spec for run in shard.runs]


class ShardsWriting:
    """Takes staged extents from any thread and writes them on the pool's threads. Thread-safe.

    ``previous`` opens the checkpoint that this one may take files over from; asked for once, on a thread of the pool.
    ``start`` gives the attempt, made by whichever thread comes first; ``fail`` poisons the save; ``failed`` says that
    it is poisoned; ``changed`` is called when a shard is done. All errors end in ``fail``.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        step: int,
        shard_format: ShardFormat,
        digest: Digest,
        encoder: Encoder,
        previous: Callable[[], Previous | None],
        pool: WriterPool,
        encoding_pool: WriterPool,
        arena: Arena,
        events: EventBus,
        start: Callable[[], Attempt],
        fail: Callable[[BaseException], None],
        failed: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        self._step = step
        self._format = shard_format
        self._digest = digest
        self._encoder = encoder
        self._open_previous = previous
        self._previous: Previous | None = None
        self._begun = False
        self._pool = pool
        self._encoding_pool = encoding_pool
        self._arena = arena
        self._events = events
        self._start = start
        self._fail = fail
        self._failed = failed
        self._changed = changed
        self._extents = layout.extents()
        self._lock = threading.Lock()
        self._open_lock = threading.Lock()
        self._in_flight = 0
        self._parked_bytes = 0
        self._abandoned = False
        self.written_bytes = 0
        #: Shards that are not durable yet.
        self.unfinished = sum(bool(shard.extents) for shard in layout.shards)
        self._shards: list[_Progress] = []
        first = 0
        for shard in layout.shards:
            progress = _Progress(shard, first, len(shard.extents), shard.reserved_bytes)
            progress.finished = not shard.extents
            self._shards.append(progress)
            first += len(shard.extents)

    def _begin(self) -> None:
        with self._open_lock:
            if self._begun:
                return
            self._begun = True
            if self._failed() or (previous := self._open_previous()) is None:
                return
            self._previous = previous
            for progress in self._shards:
                progress.old = previous.candidate(progress.shard) if progress.shard.extents else None
                progress.matching = progress.old is not None

    # -- what the save asks ------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Extents that a thread may still be working on."""
        return self._in_flight

    def unwritten_bytes(self) -> int:
        """What will still be taken from the disk (0 where blocks are reserved, written or linked)."""
        return sum(
            progress.shard.nbytes
            for progress in self._shards
            if progress.writer is None and not progress.finished and not (progress.matching and progress.matched)
        )

    def expected_bytes(self) -> int:
        """What the disk must have room for: frozen tensors that the previous checkpoint holds are taken to be equal."""
        self._begin()
        return sum(
            progress.shard.nbytes
            for progress in self._shards
            if progress.old is None or not all(spec.frozen for spec in specs_of(progress.shard))
        )

    def abandon(self) -> None:
        """The save is poisoned: give back what waits for its turn. Idempotent."""
        with self._lock:
            self._abandoned = True
            waiting = [item for progress in self._shards for item in progress.parked.values()]
            for progress in self._shards:
                progress.parked.clear()
            self._parked_bytes = 0
        for item in waiting:
            self._let_go(item)

    def records(self) -> list[FileRecord]:
        """The files as written; to be asked once nothing is unfinished."""
        return [
            FileRecord(progress.shard.file, progress.nbytes, self._extents_of(progress), progress.shard.plan)
            for progress in self._shards
            if progress.shard.extents
        ]

    def files(self) -> dict[str, KnownFile]:
        """The same, for the next save to compare with."""
        return {
            record.name: KnownFile(record, tuple(progress.records[n] for n in range(len(progress.shard.extents))))
            for progress, record in zip((p for p in self._shards if p.shard.extents), self.records(), strict=True)
        }

    def orders(self) -> Mapping[str, list[int]]:
        """For each file: the position, among its record's extents, of each of its layout's extents."""
        found: dict[str, list[int]] = {}
        for progress in self._shards:
            index = {extent.offset: at for at, extent in enumerate(self._extents_of(progress))}
            found[progress.shard.file] = [
                index[progress.records[number].offset] for number in range(len(progress.shard.extents))
            ]
        return found

    def close(self) -> None:
        """Let go of the previous checkpoint. After the save has ended, whichever way. Idempotent."""
        previous, self._previous = self._previous, None
        if previous is not None:
            previous.reader.close()

    def linked(self) -> tuple[int, int]:
        """``(files, bytes)`` taken over from the previous checkpoint without writing."""
        chosen = [progress for progress in self._shards if progress.linked]
        return len(chosen), sum(progress.nbytes for progress in chosen)

    @staticmethod
    def _extents_of(progress: _Progress) -> tuple[ExtentRecord, ...]:
        return tuple(sorted([*progress.records.values(), *progress.edges], key=lambda extent: extent.offset))

    # -- extents -----------------------------------------------------------------------------------------------------

    def take(self, number: int, slot: Slot, ready: Ready, digest: str | None) -> None:
        """Accept a staged extent, with its content digest where it was taken already. Never blocks."""
        self._submit(lambda: self._handle(number, slot, ready, digest))

    def _submit(self, work: Callable[[], None], pool: WriterPool | None = None) -> None:
        with self._lock:
            self._in_flight += 1
        (pool or self._pool).submit(lambda: self._run(work))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._lock:
                self._in_flight -= 1
            self._changed()

    def _handle(self, number: int, slot: Slot, ready: Ready, digest: str | None) -> None:
        extent = self._extents[number]
        progress = self._shards[extent.shard]
        kept = False
        try:
            if not self._failed():
                self._begin()
                ready()
                # the digest is of the staged bytes, before anything below this line could spoil them
                found = digest or self._digest(content(extent, slot))
                if not self._matches(progress, number - progress.first, found):
                    kept = self._store(progress, number - progress.first, extent, slot, found)
        finally:
            if not kept:
                self._arena.release(slot)

    def _matches(self, progress: _Progress, number: int, found: str) -> bool:
        """Whether nothing has to be written for now, because the previous checkpoint has these bytes."""
        old = progress.old
        if old is None:
            return False
        with self._lock:
            if not progress.matching:
                return False
            if (old.ordered[number].content or old.ordered[number].digest) == found:
                progress.matched.append(number)
                if len(progress.matched) < len(progress.shard.extents):
                    return True
                complete, copies = True, [n for n in progress.matched if n != number]
            else:
                progress.matching = complete = False
                copies, progress.matched = progress.matched, []
        if complete and self._link(progress, old):
            return True
        for copied in copies:
            self._submit(functools.partial(self._copy, progress, copied))
        return False

    def _store(self, progress: _Progress, number: int, extent: Extent, slot: Slot, found: str) -> bool:
        """Write an extent; True where the slot is needed on and will be released later."""
        if not progress.shard.floating:
            stored = extent.stored if extent.stored != extent.nbytes else 0
            self._write(progress, slot.view, ExtentRecord(extent.offset, extent.nbytes, found, "", stored), number)
            return False
        if self._encoder.wanted():
            work = functools.partial(self._encode, progress, number, extent, slot, found)
            self._submit(work, self._encoding_pool)
        else:
            for item, offset in self._place(progress, _Parked(number, slot, as_it_is(extent, slot), found)):
                self._write_placed(progress, item, offset)
        return True

    def _encode(self, progress: _Progress, number: int, extent: Extent, slot: Slot, found: str) -> None:
        try:
            if self._failed():
                raise SaveAbandoned(f"step {self._step}: given up before all of it was encoded")
            frame = self._encoder.encode(extent, slot)
        except BaseException:
            self._arena.release(slot)
            raise
        for item, offset in self._place(progress, _Parked(number, slot, frame, found)):
            self._submit(functools.partial(self._write_placed, progress, item, offset))

    def _place(self, progress: _Progress, item: _Parked) -> list[tuple[_Parked, int]]:
        """What can be written now, and where: frames get their places in the layout's order, and one whose turn has not
        come is parked in its slot. So that parked slots can never keep the others from being staged, order is given up
        where they hold much of the arena: the manifest says where everything is."""
        with self._lock:
            slot = item.slot
            if self._abandoned:
                self._let_go(item)
                return []
            room = slot is not None and self._parked_bytes + slot.nbytes <= self._arena.budget_bytes // 4
            if slot is not None and room and item.number != progress.turn:
                self._encoder.park(item.frame, slot)
                progress.parked[item.number] = item
                self._parked_bytes += slot.nbytes
                return []
            placed = [(item, self._advance(progress, item))]
            while (after := progress.parked.pop(progress.turn, None)) is not None:
                self._parked_bytes -= after.slot.nbytes if after.slot is not None else 0
                placed.append((after, self._advance(progress, after)))
        if item.frame.buffer is not None and slot is not None:  # what was staged is in the buffer now
            item.slot = None
            self._arena.release(slot)
        return placed

    def _let_go(self, item: _Parked) -> None:
        """Give back the memory a frame lies in."""
        self._encoder.release(item.frame.buffer)
        if item.slot is not None:
            self._arena.release(item.slot)

    def _advance(self, progress: _Progress, item: _Parked) -> int:
        offset = progress.cursor
        progress.cursor += padded(item.frame.stored)
        if item.number == progress.turn:
            progress.turn += 1
            while progress.turn in progress.records:  # placed out of turn before
                progress.turn += 1
        progress.records[item.number] = ExtentRecord(offset, 0, "")
        return offset

    def _write_placed(self, progress: _Progress, item: _Parked, offset: int) -> None:
        frame = item.frame
        try:
            if self._failed():
                return
            alone = len(progress.shard.extents) == 1 and not self._has_edges(progress.shard)
            nbytes = frame.stored if alone else padded(frame.stored)
            # a chunk stored as it is has been digested already
            known = frame.unchanged and nbytes == padded(frame.stored)
            digest = item.content if known else self._digest(frame.view[:nbytes])
            record = ExtentRecord(offset, nbytes, digest, item.content, frame.stored)
            self._write(progress, frame.view, record, item.number)
        finally:
            self._let_go(item)

    @staticmethod
    def _has_edges(shard: Shard) -> bool:
        return shard.reserved_bytes > 0 or chunks.chunk_count(shard.runs[0].tensor) > 1

    def _write(self, progress: _Progress, view: memoryview, record: ExtentRecord, number: int) -> None:
        began = time.perf_counter()
        writer = self._writer(progress)
        with self._encoder.balance.writing(record.nbytes):
            writer.write_at(view, record.nbytes, record.offset)
        now = time.perf_counter()
        self._events.emit(ExtentWritten(step=self._step, at_seconds=now, nbytes=record.nbytes, seconds=now - began))
        with self._lock:
            progress.records[number] = record
            progress.missing -= 1
            self.written_bytes += record.nbytes
            complete = progress.missing == 0
        if complete and not self._failed():
            self._finish(progress)

    def _copy(self, progress: _Progress, number: int) -> None:
        """An extent that matched, of a shard that did not: out of the previous checkpoint, verified."""
        if self._failed() or self._previous is None or progress.old is None:
            return
        old = progress.old.ordered[number]
        name = progress.old.record.name
        buffer = memoryview(aligned_buffer(old.nbytes))
        got = self._previous.reader.read_into(name, buffer, old.nbytes, old.offset)
        if got != old.nbytes or self._digest(buffer[: old.nbytes]) != old.digest:
            raise CheckpointDamaged(
                f"{self._previous.reader.path}/{name} [{old.offset}:{old.offset + old.nbytes}]: damaged "
                f"since it was written, and wanted for step {self._step}. Save again: it will be written anew"
            )
        if not progress.shard.floating:
            self._write(progress, buffer, old, number)
            return
        buffer[old.nbytes :] = bytes(buffer.nbytes - old.nbytes)
        copied = _Parked(number, None, Frame(buffer, old.stored, None), old.content)
        for item, offset in self._place(progress, copied):
            self._write_placed(progress, item, offset)

    # -- shards ------------------------------------------------------------------------------------------------------

    def _writer(self, progress: _Progress) -> ShardWriter:
        attempt = self._start()
        with self._open_lock:
            if progress.writer is None:
                progress.writer = attempt.create_shard(progress.shard.file, progress.shard.nbytes)
            return progress.writer

    def _finish(self, progress: _Progress) -> None:
        """Head, tail, and everything on the disk."""
        writer = self._writer(progress)
        end = progress.shard.nbytes
        if progress.shard.floating:
            ordered = [progress.records[number] for number in range(len(progress.shard.extents))]
            placed = [Placed(record.offset, record.nbytes, record.stored) for record in ordered]
            head, tail = self._format.seal(progress.shard, placed, self._encoder.codec)
            end = max(place.offset + place.nbytes for place in placed)
            for offset, data in ((0, head), (end, tail)):
                if data:
                    view = memoryview(aligned_buffer(len(data)))
                    view[: len(data)] = data
                    progress.edges.append(ExtentRecord(offset, len(data), self._digest(view[: len(data)])))
                    writer.write_at(view, len(data), offset)
            end += len(tail)
        writer.finish(end)
        progress.nbytes = end
        self._done(progress)

    def _link(self, progress: _Progress, old: KnownFile) -> bool:
        """Take the whole file over; False where the file system cannot (its extents are then copied)."""
        previous = self._previous
        if previous is None or not self._start().link(previous.reader, old.record.name, old.record.nbytes):
            progress.matching = False
            return False
        with self._lock:
            progress.records = dict(enumerate(old.ordered))
            known = {record.offset for record in old.ordered}
            progress.edges = [extent for extent in old.record.extents if extent.offset not in known]
            progress.nbytes = old.record.nbytes
            progress.linked = True
            progress.missing = 0
        self._done(progress)
        return True

    def _done(self, progress: _Progress) -> None:
        with self._lock:
            progress.finished = True
            self.unfinished -= 1
