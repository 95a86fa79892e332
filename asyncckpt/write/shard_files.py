"""Makes the files of one save, and what a format adds to them once all extents are in their places."""

from __future__ import annotations

from asyncckpt.manifest.records import ExtentRecord
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Codec, Digest, ShardFormat, ShardWriter
from asyncckpt.scope import SaveScope
from asyncckpt.types import WrittenRange
from asyncckpt.write.directory import SaveDirectory
from asyncckpt.write.progress import ShardProgress


class ShardFiles:
    """Has the file of each shard, made when it is written first. Thread-safe. All methods block on the storage.

    ``scope``: the save's, which a file that cannot be made fails.
    """

    def __init__(
        self, scope: SaveScope, directory: SaveDirectory, shard_format: ShardFormat, digest: Digest, codec: Codec
    ) -> None:
        self._scope = scope
        self._directory = directory
        self._format = shard_format
        self._digest = digest
        self._codec = codec

    def writer(self, progress: ShardProgress) -> ShardWriter:
        """Return the file of a shard. Raises what made the save fail."""
        directory = self._directory.open()
        with progress.lock:  # other files are made meanwhile
            if progress.writer is None:
                self._scope.raise_if_failed()
                try:
                    progress.writer = directory.create_shard(
                        progress.shard.file, progress.shard.nbytes, shared=progress.shard.multi_writer
                    )
                except BaseException as error:  # before the lock goes: whoever tried again would find this try's file
                    self._scope.fail(error)
                    raise
            return progress.writer

    def finish(self, progress: ShardProgress) -> None:
        """Write the head and the tail of a shard whose extents are written, and make the file durable."""
        self._scope.raise_if_failed()
        writer = self.writer(progress)
        end = progress.shard.nbytes
        if progress.shard.packed_on_write:
            placed = [WrittenRange(record.offset, record.nbytes, record.payload_bytes) for record in progress.ordered()]
            head, tail = self._format.seal(progress.shard, placed, self._codec)
            end = max(place.offset + place.nbytes for place in placed)
            for offset, data in ((0, head), (end, tail)):
                if data:
                    view = memoryview(aligned_buffer(len(data)))
                    view[: len(data)] = data
                    progress.format_extents.append(ExtentRecord(offset, len(data), self._digest(view[: len(data)])))
                    writer.write_at(view, len(data), offset)
            end += len(tail)
        writer.finish(end)
        progress.nbytes = end
