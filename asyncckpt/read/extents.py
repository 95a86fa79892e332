"""Reads extents, compares them with the manifest's digests, and only then hands them on.

Several threads read ahead, each into an aligned buffer of its own. Reading, hashing and copying release the GIL.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from asyncckpt import interrupts
from asyncckpt.codecs import digests
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Digest, Reader
from asyncckpt.read.damage import Damage
from asyncckpt.types import ALIGNMENT_BYTES

#: These are enough to keep the device busy while others hash and copy. More threads than cores only cost buffers, which
#: are fresh memory (docs/design/004-reading.md).
READ_THREADS = min(8, max(2, os.cpu_count() or 2))
#: Small extents that lie side by side are read together, up to this many bytes.
_READ_BYTES = 8 << 20
#: All threads' buffers together take at most this many bytes: where extents are large, fewer threads read.
_BUFFERS_BYTES = 1 << 30

#: Whoever breaks off the reading waits so long for each thread's last read, which a hung disk may never end.
_STOPPING_SECONDS = 30.0

Consume = Callable[[FileRecord, ExtentRecord, memoryview], None]
#: Extents, each with the file that it lies in.
Extents = Sequence[tuple[FileRecord, ExtentRecord]]
#: It reads extents of a checkpoint as ``read_extents`` does, alone or together with other ranks.
Read = Callable[[Reader, Manifest, Extents, Consume], list[Damage]]


def read_small_file(reader: Reader, manifest: Manifest, name: str, limit_bytes: int) -> bytes:
    """Return the verified content of a small file that the manifest lists. Blocks. Raises ``CheckpointDamaged``."""
    record = next((record for record in manifest.files if record.name == name), None)
    if record is None:
        raise CheckpointDamaged(f"{reader.path}: the manifest does not list {name}")
    return read_record(reader, manifest, record, limit_bytes)


def read_record(reader: Reader, manifest: Manifest, record: FileRecord, limit_bytes: int) -> bytes:
    """Return the verified content of the small file with this record. Blocks. Raises ``CheckpointDamaged``."""
    data = reader.read_small(record.name, limit_bytes)
    digest = digests.get(manifest.digest)
    if len(data) != record.nbytes or any(
        digest(data[e.offset : e.offset + e.nbytes]) != e.digest for e in record.extents
    ):
        raise CheckpointDamaged(f"{reader.path}/{record.name}: the content does not match its digest")
    return data


def read_extents(
    reader: Reader,
    algorithm: str,
    wanted: Iterable[tuple[FileRecord, ExtentRecord]],
    consume: Consume,
    *,
    threads: int = READ_THREADS,
    stop_at_damage: bool = True,
) -> list[Damage]:
    """Read and verify extents, and call ``consume(file, extent, view)`` with each good one on a reader thread. Return
    the damage.

    Bytes are handed on from the very buffer that was verified. Blocks until all is done. With ``stop_at_damage`` the
    first damage ends the reading; otherwise all damage is collected. An exception that a signal handler raises
    meanwhile ends it too. Raises what ``consume`` raises, and
    ``MemoryError`` where there is no memory for the buffers (1 GiB in all, or the largest extent): the checkpoint may
    be fine.
    """
    reads = deque(_merged(wanted))
    if not reads:
        return []
    largest = max(1, *(read.end - read.begin for read in reads))
    run = _ParallelRead(reader, digests.get(algorithm), reads, consume, stop_at_damage)
    # not ``Thread.join``: one that was interrupted takes the thread for ended from then on (bpo-45274)
    ended = [threading.Event() for _ in range(max(1, min(threads, len(reads), _BUFFERS_BYTES // largest)))]
    started = 0
    try:
        for number, event in enumerate(ended):
            work = functools.partial(run.work_in_thread, largest, event)
            started = number + 1
            threading.Thread(target=work, name=f"asyncckpt-reader-{number}", daemon=True).start()
        for event in ended:
            interrupts.wait_for(event.wait, None)
    except BaseException as error:  # such as Ctrl-C: whoever is told of it must find nobody writing any more
        run.error = run.error or error
        for event in ended[:started]:
            event.wait(_STOPPING_SECONDS)
        raise
    if run.error is not None:
        raise run.error
    return sorted(run.damage, key=lambda d: (d.file, d.offset))


def read_here(lend: Callable[[int], memoryview]) -> Read:
    """Return what reads as ``read_alone`` does, but on the calling thread alone, into memory that ``lend(nbytes)``
    gives, aligned and in whole blocks: for callers that work on several threads already, and keep their memory."""

    def read(reader: Reader, manifest: Manifest, wanted: Extents, consume: Consume) -> list[Damage]:
        reads = deque(_merged(wanted))
        if not reads:
            return []
        buffer = lend(max(1, *(one.end - one.begin for one in reads)))
        run = _ParallelRead(reader, digests.get(manifest.digest), reads, consume, True)
        run.work(buffer)
        if run.error is not None:
            raise run.error
        return sorted(run.damage, key=lambda d: (d.file, d.offset))

    return read


def read_alone(reader: Reader, manifest: Manifest, wanted: Extents, consume: Consume) -> list[Damage]:
    """Do what ``read_extents`` does, with the digest that the manifest names."""
    return read_extents(reader, manifest.digest, wanted, consume)


@dataclass(frozen=True, slots=True)
class _Read:
    """One read takes extents of a file that lie side by side. ``begin`` is aligned."""

    file: FileRecord
    begin: int
    end: int
    extents: list[ExtentRecord]


def _merged(wanted: Iterable[tuple[FileRecord, ExtentRecord]]) -> Iterator[_Read]:
    """Merge neighbours that were asked for one after the other, as long as that makes no read too large."""
    group: list[ExtentRecord] = []
    file: FileRecord | None = None
    for record, extent in wanted:
        if group and (
            record is not file
            or extent.offset != group[-1].offset + group[-1].nbytes
            or extent.offset + extent.nbytes - group[0].offset > _READ_BYTES
        ):
            yield _read_of(file or record, group)
            group = []
        file = record
        group.append(extent)
    if group and file is not None:
        yield _read_of(file, group)


def _read_of(file: FileRecord, extents: list[ExtentRecord]) -> _Read:
    begin = extents[0].offset // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    return _Read(file, begin, extents[-1].offset + extents[-1].nbytes, extents)


class _ParallelRead:
    """Holds what the reader threads share: the reads that are left, the damage found, and the first error."""

    def __init__(
        self,
        reader: Reader,
        digest: Digest,
        reads: deque[_Read],
        consume: Consume,
        stop_at_damage: bool,
    ) -> None:
        self.damage: list[Damage] = []
        self.error: BaseException | None = None
        self._reader = reader
        self._digest = digest
        self._reads = reads
        self._consume = consume
        self._stop_at_damage = stop_at_damage

    def work_in_thread(self, largest: int, ended: threading.Event) -> None:
        """Work in a buffer of this thread's own, and set ``ended``. ``largest``: the longest read, in bytes."""
        try:
            self._work_in_buffer(largest)
        finally:
            ended.set()

    def _work_in_buffer(self, largest: int) -> None:
        try:
            buffer = memoryview(aligned_buffer(largest))
        except (OSError, MemoryError) as error:  # no reader, no verdict: never "nothing is wrong"
            self.error = MemoryError(f"no memory to read {largest} bytes into ({error})")
            return
        self.work(buffer)

    def work(self, buffer: memoryview) -> None:
        """Take one read after the other until none is left. ``buffer`` has room for the longest."""
        while not self._is_broken_off() and not (self.damage and self._stop_at_damage):
            try:
                read = self._reads.popleft()
            except IndexError:
                return
            try:
                got: int | OSError = self._reader.read_into(read.file.name, buffer, read.end - read.begin, read.begin)
            except OSError as error:
                got = error
                if len(read.extents) > 1:  # it may be only one of them that cannot be read
                    self._reads.extendleft(_read_of(read.file, [extent]) for extent in reversed(read.extents))
                    continue
            except CheckpointDamaged as error:
                self.damage += [Damage(read.file.name, e.offset, e.nbytes, str(error)) for e in read.extents]
                continue
            for extent in read.extents:
                if self._is_broken_off():
                    return
                try:
                    problem = self._hand_on(read, extent, buffer, got)
                except CheckpointDamaged as error:
                    problem = str(error)
                except BaseException as error:
                    self.error = error
                    return
                if problem:
                    self.damage.append(Damage(read.file.name, extent.offset, extent.nbytes, problem))

    def _is_broken_off(self) -> bool:
        return self.error is not None

    def _hand_on(self, read: _Read, extent: ExtentRecord, buffer: memoryview, got: int | OSError) -> str | None:
        """Verify one extent of a read that gave ``got`` bytes, and hand it on. Return what is wrong with it, if
        anything."""
        if isinstance(got, OSError):
            return f"reading failed: {got.strerror or got}"
        place = extent.offset - read.begin
        if place + extent.nbytes > got:
            return f"the file ends after {read.begin + got} bytes"
        data = buffer[place : place + extent.nbytes]
        if self._digest(data) != extent.digest:
            return "the bytes do not match their digest"
        self._consume(read.file, extent, data)
        return None


def extents_of(
    manifest: Manifest, ranges: Mapping[str, list[tuple[int, int]]]
) -> list[tuple[FileRecord, ExtentRecord]]:
    """Return the extents that cover byte ranges of files, each once, in file order. ``ranges``: ``(begin, end)`` by
    file name."""
    chosen: list[tuple[FileRecord, ExtentRecord]] = []
    for record in manifest.files:
        if record.name not in ranges:
            continue
        spans = sorted(span for span in ranges[record.name] if span[0] < span[1])
        if not spans:
            continue  # a part of the manifest may have to be read to know the extents
        at = 0
        for extent in record.extents:
            while at < len(spans) and spans[at][1] <= extent.offset:
                at += 1
            if at < len(spans) and spans[at][0] < extent.offset + extent.nbytes:
                chosen.append((record, extent))
    return chosen
