"""Files of a checkpoint are taken over into another one: linked where the storage can, or copied, every byte
verified."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from asyncckpt.codecs import digests
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Digest, PendingDirectory, Reader
from asyncckpt.types import ALIGNMENT_BYTES

#: Extents that lie side by side are copied together, up to this many bytes.
_WINDOW_BYTES = 16 << 20
#: While one window waits for one disk, others wait for the other.
_THREADS = 3


def link_files(directory: PendingDirectory, reader: Reader, manifest: Manifest, records: Iterable[FileRecord]) -> int:
    """Take files of the checkpoint that ``reader`` has open over into ``directory``, on the same storage; return how
    many bytes had to be copied, as the storage has no links. Blocks. Raises ``CheckpointDamaged``."""
    copied = 0
    for record in records:
        if not directory.link(reader, record.name, record.nbytes, record.name):
            copied += copy_file(directory, reader, manifest, record)
    return copied


def copy_file(directory: PendingDirectory, reader: Reader, manifest: Manifest, record: FileRecord) -> int:
    """Copy a file, and verify each extent before it is written; return its size. The copy's bytes are durable then.
    Blocks. Raises ``CheckpointDamaged`` where the file is not what the manifest says."""
    writer = directory.create_shard(record.name, record.nbytes)
    digest, local = digests.get(manifest.digest), threading.local()

    def one(extents: list[ExtentRecord]) -> None:
        begin, end = extents[0].offset, extents[-1].offset + extents[-1].nbytes
        buffer: memoryview | None = getattr(local, "buffer", None)
        if buffer is None or len(buffer) < end - begin:
            buffer = local.buffer = memoryview(aligned_buffer(end - begin))
        _read(reader, record, buffer, extents, digest)
        writer.write_at(buffer, end - begin, begin)

    with ThreadPoolExecutor(_THREADS, "asyncckpt-copy") as pool:
        try:
            for _ in pool.map(one, _windows(record)):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    writer.finish(record.nbytes)
    return record.nbytes


def _read(reader: Reader, record: FileRecord, buffer: memoryview, extents: list[ExtentRecord], digest: Digest) -> None:
    begin = extents[0].offset
    got = reader.read_into(record.name, buffer, extents[-1].offset + extents[-1].nbytes - begin, begin)
    for extent in extents:
        at = extent.offset - begin
        where = f"{reader.path}/{record.name} [{extent.offset}:{extent.offset + extent.nbytes}]"
        if at + extent.nbytes > got:
            raise CheckpointDamaged(f"{where}: the file ends after {begin + got} bytes")
        if digest(buffer[at : at + extent.nbytes]) != extent.digest:
            raise CheckpointDamaged(f"{where}: the bytes do not match their digest")


def _windows(record: FileRecord) -> Iterator[list[ExtentRecord]]:
    """Yield the extents of a file in groups that begin at a whole block: two threads never write into one."""
    window: list[ExtentRecord] = []
    for extent in record.extents:
        full = window and extent.offset + extent.nbytes - window[0].offset > _WINDOW_BYTES
        if full and not extent.offset % ALIGNMENT_BYTES:
            yield window
            window = []
        window.append(extent)
    if window:
        yield window
