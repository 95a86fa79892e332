"""The shards of one save on their way to disk: digest, compare with the previous checkpoint, encode, place, write.

A shard whose extents all have the previous checkpoint's content is linked, not written. As long as a shard's extents
match, none of them is written; from the first that differs on, those that matched are copied over from the previous
checkpoint, verified.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from asyncckpt.codecs.blosc import SPLIT_MARK, Array
from asyncckpt.errors import CheckpointDamaged, SaveAbandoned
from asyncckpt.events import EventBus, ExtentWritten
from asyncckpt.manifest.records import ExtentRecord, FileRecord
from asyncckpt.memory.arena import Arena, Slot
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.protocols import Attempt, Digest, ShardFormat, ShardWriter
from asyncckpt.read.delta import LayerReader, layer_name
from asyncckpt.stage.image import Frame, as_it_is, content_digest, cut_digest, finish_image, slot_bytes
from asyncckpt.stage.job import Ready
from asyncckpt.types import LEAD_BYTES, Extent, Layout, Placed
from asyncckpt.write.encoder import Encoder
from asyncckpt.write.progress import Parked, Progress
from asyncckpt.write.reorder_buffer import Parking
from asyncckpt.write.reuse import KnownFile, Previous
from asyncckpt.write.small_file_queue import SmallShards
from asyncckpt.write.threads import Pools, WriterPool


class ShardsWriting:
    """Takes staged extents from any thread and writes them on the pool's threads. Thread-safe.

    ``previous`` opens the checkpoint that this one may take files over from; asked for once, on a thread of the pool.
    ``second``: what has to agree before anything is taken over, where ``digest`` alone is too short to decide that.
    ``chain``: how often in a row a file may be saved as differences to that checkpoint's.
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
        second: Digest | None,
        encoder: Encoder,
        previous: Callable[[], Previous | None],
        chain: int,
        pools: Pools,
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
        self._second = second
        self._encoder = encoder
        self._open_previous = previous
        self._chain = chain
        self._layer_reader: LayerReader | None = None
        self._unused: list[FileRecord] = []
        self._previous: Previous | None = None
        self._begun = False
        self._pools = pools
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
        self._parking = Parking(self._lock, encoder, arena)
        self.written_bytes = 0
        #: Shards that are not durable yet.
        self.unfinished = sum(bool(shard.extents) for shard in layout.shards)
        self._shards: list[Progress] = []
        first = 0
        for shard in layout.shards:
            progress = Progress(shard, first, len(shard.extents), shard.reserved_bytes)
            progress.finished = not shard.extents
            self._shards.append(progress)
            first += len(shard.extents)
        self._small = SmallShards(layout, pools, arena)

    def _begin(self) -> None:
        with self._open_lock:
            if self._begun:
                return
            self._begun = True
            if self._failed() or (previous := self._open_previous()) is None:
                return
            self._previous = previous
            self._layer_reader = LayerReader(previous.reader, self._encoder.codec, self._digest)
            for progress in self._shards:
                old = previous.candidate(progress.shard) if progress.shard.extents else None
                if old is not None and self._second is not None and len(old.seconds) != len(progress.shard.extents):
                    old = None  # another process wrote it
                progress.old = old
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
        return sum(progress.shard.nbytes for progress in self._shards if progress.old is None or not progress.frozen)

    def abandon(self) -> None:
        """The save is poisoned: give back what waits for its turn. Idempotent."""
        self._parking.abandon(self._shards)
        self._small.hold_no_longer()

    def give_up(self, stuck_seconds: float) -> None:
        """What of it has been in the kernel for that long may never come back: others take the threads' place."""
        self._encoder.give_up(self._pools.replace_stuck(stuck_seconds))

    def records(self) -> list[FileRecord]:
        """The files as written, those they build on included; to be asked once nothing is unfinished."""
        written = [progress.record() for progress in self._shards if progress.shard.extents]
        return written + [layer for progress in self._shards for layer in progress.layers or ()] + self._unused

    def files(self) -> dict[str, KnownFile]:
        """The same, for the next save to compare with."""
        return {progress.shard.file: progress.known() for progress in self._shards if progress.shard.extents}

    def orders(self) -> Mapping[str, list[int]]:
        """For each file: the position, among its record's extents, of each of its layout's extents."""
        found: dict[str, list[int]] = {}
        for progress in self._shards:
            index = {extent.offset: at for at, extent in enumerate(progress.extents())}
            found[progress.shard.file] = [index[extent.offset] for extent in progress.ordered()]
        return found

    def close(self) -> None:
        """Let go of the previous checkpoint. After the save has ended, whichever way. Idempotent."""
        previous, self._previous = self._previous, None
        if previous is not None:
            previous.reader.close()

    def linked_bytes(self) -> int:
        """Bytes of the checkpoint that were taken over without writing them."""
        whole = sum(progress.nbytes for progress in self._shards if progress.linked)
        layers = [layer for progress in self._shards for layer in progress.layers or ()]
        return whole + sum(layer.nbytes for layer in (*layers, *self._unused))

    # -- extents -----------------------------------------------------------------------------------------------------

    def take(self, number: int, slot: Slot, ready: Ready, digest: str | None) -> None:
        """Accept a staged extent, with its content digest where it was taken already. Never blocks."""
        with self._lock:
            self._in_flight += 1
        shard = self._shards[self._extents[number].shard].shard
        self._small.submit(shard, slot.nbytes, lambda: self._run(lambda: self._handle(number, slot, ready, digest)))

    def _submit(self, work: Callable[[], None], pool: WriterPool) -> None:
        with self._lock:
            self._in_flight += 1
        pool.submit(lambda: self._run(work))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CheckpointDamaged as error:  # only the previous checkpoint is read here
            why = f"step {self._step}: what has not changed was to be taken over, but is damaged since it was written"
            self._fail(CheckpointDamaged(f"{why}: {error}. Save again: everything will be written anew"))
        except BaseException as error:
            self._fail(error)
        finally:
            with self._lock:
                self._in_flight -= 1
            self._changed()

    def _handle(self, number: int, slot: Slot, ready: Ready, digest: str | None) -> None:
        extent = self._extents[number]
        progress = self._shards[extent.shard]
        owned = True
        try:
            if not self._failed():
                self._begin()
                ready()
                # the digest is of the staged bytes, before anything below this line could spoil them
                found = digest or content_digest(self._digest, extent, slot)
                number -= progress.first
                if self._second is not None:
                    progress.seconds[number] = content_digest(self._second, extent, slot)
                if self._matches(progress, number, found):
                    return
                if progress.shard.floating:
                    owned = False
                    self._store_chunk(progress, number, extent, slot, found)
                else:
                    stored = extent.stored if extent.stored != extent.nbytes else 0
                    record = ExtentRecord(extent.offset, extent.nbytes, found, "", stored)
                    self._write(progress, slot.view[extent.lead :], record, number)
        finally:
            if owned:
                self._arena.release(slot)

    def _matches(self, progress: Progress, number: int, found: str) -> bool:
        """Whether nothing has to be written for now, because the previous checkpoint has these bytes."""
        old = progress.old
        if old is None:
            return False
        with self._lock:
            if not progress.matching:
                return False
            if progress.equal(old, number, found):
                progress.matched.append(number)
                if len(progress.matched) < len(progress.shard.extents):
                    return True
                complete, copies = True, [n for n in progress.matched if n != number]
            else:
                progress.matching = complete = False
                copies, progress.matched = progress.matched, []
        if complete and self._link(progress, old):
            return True
        progress.matching = False
        # what is encoded again waits for a buffer, which only those that write give back: it is not for their threads
        encodes = self._chain and progress.shard.floating
        pool = self._pools.encoding if encodes else self._small.pool(progress.shard)
        for copied in copies:
            self._submit(functools.partial(self._copy, progress, copied), pool)
        return False

    def _store_chunk(self, progress: Progress, number: int, extent: Extent, slot: Slot, found: str) -> None:
        """Encode a chunk, or not, and write it; the slot is released on the way."""
        if self._chain or self._encoder.wanted(extent):
            work = functools.partial(self._encode, progress, number, extent, slot, found)
            self._submit(work, self._pools.encoding)
        else:
            self._write_all(
                progress, self._parking.place(progress, Parked(number, slot, as_it_is(extent, slot), found))
            )

    def _encode(self, progress: Progress, number: int, extent: Extent, slot: Slot, found: str) -> None:
        try:
            if self._failed():
                raise SaveAbandoned(f"step {self._step}: given up before all of it was encoded")
            frame = self._frame(progress, number, extent, slot)
        except BaseException:
            self._arena.release(slot)
            raise
        for placed in self._parking.place(progress, Parked(number, slot, frame, found)):
            self._submit(functools.partial(self._write_placed, progress, *placed), self._small.pool(progress.shard))

    def _frame(self, progress: Progress, number: int, extent: Extent, slot: Slot) -> Frame:
        layers = self._layers_of(progress)
        if layers and self._layer_reader is not None and progress.old is not None:
            data: Array = np.frombuffer(slot.view, np.uint8)[LEAD_BYTES : extent.nbytes]
            self._layer_reader.add(progress.old.layers, number, data)
        frame = self._encoder.encode(extent, slot)
        frame.unchanged = frame.unchanged and not layers
        return frame

    def _layers_of(self, progress: Progress) -> tuple[FileRecord, ...]:
        """The files that this shard's chunks are saved as differences to; they are linked into the checkpoint first."""
        with progress.lock:
            if progress.layers is not None:
                return progress.layers
            progress.layers = ()
            old, previous = progress.old, self._previous
            if old is None or previous is None or len(old.layers) > self._chain:
                return ()
            layers = [replace(layer, name=layer_name(layer, previous.reader), bases=()) for layer in old.layers]
            linked = [
                self._start().link(previous.reader, layer.name, layer.nbytes, new.name)
                for layer, new in zip(old.layers, layers, strict=True)
            ]
            if all(linked):
                progress.layers = tuple(layers)
            else:  # no differences, then; what is linked already stays, listed like everything else
                self._unused += [layer for layer, there in zip(layers, linked, strict=True) if there]
            return progress.layers

    def _write_all(self, progress: Progress, placed: Sequence[tuple[Parked, int]]) -> None:
        """The first on this thread, the others on any."""
        for later in placed[1:]:
            self._submit(functools.partial(self._write_placed, progress, *later), self._small.pool(progress.shard))
        for item, offset in placed[:1]:
            self._write_placed(progress, item, offset)

    def _write_placed(self, progress: Progress, item: Parked, offset: int) -> None:
        frame = item.frame
        try:
            if self._failed():
                return
            nbytes = frame.stored if progress.alone else padded(frame.stored)
            # a chunk stored as it is has been digested already
            known = frame.unchanged and nbytes == padded(frame.stored)
            digest = item.content.removeprefix(SPLIT_MARK) if known else self._digest(frame.view[:nbytes])
            record = ExtentRecord(offset, nbytes, digest, item.content, frame.stored)
            self._write(progress, frame.view, record, item.number)
        finally:
            self._parking.let_go(item)

    def _write(self, progress: Progress, view: memoryview, record: ExtentRecord, number: int) -> None:
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

    def _copy(self, progress: Progress, number: int) -> None:
        """An extent that matched, of a shard that did not: out of the previous checkpoint, verified."""
        known, previous = progress.old, self._previous
        if self._failed() or previous is None or known is None:
            return
        if self._chain and progress.shard.floating:
            self._copy_image(progress, number, known)
            return
        old = known.ordered[number]
        buffer = memoryview(aligned_buffer(old.nbytes))
        got = previous.reader.read_into(known.record.name, buffer, old.nbytes, old.offset)
        cuts = progress.shard.extents[number].cuts
        if got != old.nbytes or cut_digest(self._digest, buffer[: old.nbytes], cuts) != old.digest:
            where = f"{previous.reader.path}/{known.record.name} [{old.offset}:{old.offset + old.nbytes}]"
            raise CheckpointDamaged(f"{where}: the bytes do not match their digest")
        if not progress.shard.floating:
            self._write(progress, buffer, old, number)
            return
        item = Parked(number, None, Frame(buffer, old.stored, None), old.content)
        self._write_all(progress, self._parking.place(progress, item))

    def _copy_image(self, progress: Progress, number: int, known: KnownFile) -> None:
        """Likewise, of a chunk that is stored in layers: decoded, and encoded again on the layers it has now."""
        extent = progress.shard.extents[number]
        buffer = memoryview(aligned_buffer(slot_bytes(extent)))
        slot = Slot(-1, 0, len(buffer), 0, buffer, torch.frombuffer(buffer, dtype=torch.uint8))
        if self._layer_reader is not None:
            self._layer_reader.add(known.layers, number, np.frombuffer(buffer, np.uint8)[LEAD_BYTES : extent.nbytes])
        finish_image(extent, slot)
        item = Parked(number, None, self._frame(progress, number, extent, slot), known.ordered[number].content)
        self._write_all(progress, self._parking.place(progress, item))

    # -- shards ------------------------------------------------------------------------------------------------------

    def _writer(self, progress: Progress) -> ShardWriter:
        attempt = self._start()
        with self._open_lock:
            if progress.writer is None:
                progress.writer = attempt.create_shard(
                    progress.shard.file, progress.shard.nbytes, shared=progress.shard.shared
                )
            return progress.writer

    def _finish(self, progress: Progress) -> None:
        """Head, tail, and everything on the disk."""
        writer = self._writer(progress)
        end = progress.shard.nbytes
        if progress.shard.floating:
            placed = [Placed(record.offset, record.nbytes, record.stored) for record in progress.ordered()]
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

    def _link(self, progress: Progress, old: KnownFile) -> bool:
        """Take the whole file over; False where the file system cannot (its extents are then copied)."""
        previous = self._previous
        if previous is None:
            return False
        linked: list[FileRecord] = []
        for layer in old.layers:
            if not self._start().link(previous.reader, layer.name, layer.nbytes, layer.name):
                with progress.lock:
                    progress.layers = ()  # no differences, then
                self._unused += linked  # what is linked already stays, listed like everything else
                return False
            linked.append(layer)
        with self._lock:
            progress.records = dict(enumerate(old.ordered))
            known = {record.offset for record in progress.parts()}
            progress.edges = [extent for extent in old.record.extents if extent.offset not in known]
            progress.layers = old.bases
            progress.nbytes = old.record.nbytes
            progress.linked = True
            progress.missing = 0
        self._done(progress)
        return True

    def _done(self, progress: Progress) -> None:
        with self._lock:
            progress.finished = True
            self.unfinished -= 1
        self._small.done(progress.shard)
