"""Plain shards are written here whose bytes are made, or read elsewhere, while they are written: for a checkpoint that
is imported, averaged, or handed over by another library, and so is not staged as a save is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from asyncckpt.manifest.records import ExtentRecord, FileRecord, WrittenExtent
from asyncckpt.protocols import Digest, PendingDirectory, ShardWriter
from asyncckpt.stage.image import cut_digests
from asyncckpt.types import Extent, ShardFile

#: It is called, on several threads, with extents of a file that lie one behind the other, and gives the memory that has
#: their bytes: it begins with the first of them, is aligned to ``ALIGNMENT_BYTES``, has room up to the end of the last
#: block, and is not asked for any more once the ``with`` ends, which is after it was written.
Make = Callable[[Sequence[Extent]], AbstractContextManager[memoryview]]


def write_made_shards(
    directory: PendingDirectory,
    shards: Sequence[ShardFile],
    make: Make,
    digest: Digest,
    *,
    threads: int,
    window_bytes: int = 0,
) -> list[FileRecord]:
    """Write the files of plain shards and return their records. Their content is durable then, their names are not.

    ``make`` makes their bytes, on ``threads`` threads: extents of a file up to ``window_bytes`` at a time, and one at
    least. Blocks. Raises what ``make`` and the storage raise; nothing is written to any more then."""
    writers = [directory.create_shard(shard.file, shard.nbytes) for shard in shards]

    def one(window: Sequence[Extent]) -> list[ExtentRecord]:
        with make(window) as memory:
            return list(_written(window, memory, writers[window[0].shard], digest))

    windows = [window for shard in shards for window in _windows(shard, window_bytes)]
    try:
        with ThreadPoolExecutor(threads, "asyncckpt-made") as pool:
            try:
                found = list(pool.map(one, windows))
                list(pool.map(lambda pair: pair[0].finish(pair[1].nbytes), zip(writers, shards, strict=True)))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    rows: dict[int, list[ExtentRecord]] = {number: [] for number in range(len(shards))}
    for window, records in zip(windows, found, strict=True):
        rows[window[0].shard] += records
    return [FileRecord(shard.file, shard.nbytes, tuple(rows[number])) for number, shard in enumerate(shards)]


def _windows(shard: ShardFile, window_bytes: int) -> Iterator[list[Extent]]:
    window: list[Extent] = []
    for extent in shard.extents:
        if window and extent.offset + extent.nbytes - window[0].offset > window_bytes:
            yield window
            window = []
        window.append(extent)
    if window:
        yield window


def _written(
    window: Sequence[Extent], memory: memoryview, writer: ShardWriter, digest: Digest
) -> Iterator[ExtentRecord]:
    """Write the extents of a window; yield their records."""
    for extent in window:
        at = extent.offset - window[0].offset
        digests = cut_digests(digest, memory[at : at + extent.nbytes], extent.digest_boundaries)
        writer.write_at(memory[at:], extent.nbytes, extent.offset)
        yield from WrittenExtent(extent.offset, extent.nbytes, digests).records(extent.digest_boundaries)
