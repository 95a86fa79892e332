"""``ShardProgress`` records how far one shard of a save has come, and gives its frames their places in the file."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from asyncckpt.formats import chunking as chunks
from asyncckpt.manifest.records import ExtentRecord, FileRecord, WrittenExtent, written_extent
from asyncckpt.memory.arena import StagingBuffer
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import ShardWriter
from asyncckpt.read.delta import order_of
from asyncckpt.stage.image import Frame
from asyncckpt.types import ContentDigest, Layout, ShardFile, StagedDigests
from asyncckpt.write.reuse import ReusableFile


@dataclass(slots=True)
class EncodedChunk:
    """An encoded chunk on its way to the disk. ``number``: the chunk's among the shard's extents. ``slot``: the memory
    to release once it is written, None where that has happened. ``content``: the digest of what was encoded."""

    number: int
    slot: StagingBuffer | None
    frame: Frame
    content: ContentDigest


@dataclass(slots=True)
class ShardProgress:
    """Tracks one shard. ``records`` are its extents by number; ``format_extents`` those that the format adds; ``old``
    is the previous checkpoint's file that it may be equal to, ``matched`` are the extents found equal; ``layers`` are
    the files that its chunks are differences to (None: not decided); ``seconds`` are the extents' second digests, where
    one is not enough. ``held_back``: this rank's part of a file that several write has not changed, and is not written
    unless another rank's has. Not thread-safe."""

    shard: ShardFile
    first: int
    missing: int
    next_offset: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    old: ReusableFile | None = None
    layers: tuple[FileRecord, ...] | None = None
    writer: ShardWriter | None = None
    matched: list[int] = field(default_factory=list)
    matching: bool = False
    linked: bool = False
    held_back: bool = False
    finished: bool = False
    next_in_order: int = 0
    held: dict[int, EncodedChunk] = field(default_factory=dict)
    records: dict[int, WrittenExtent] = field(default_factory=dict)
    format_extents: list[ExtentRecord] = field(default_factory=list)
    seconds: dict[int, StagedDigests] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def alone(self) -> bool:
        """Whether the file is one frame and nothing else; such a file is not padded."""
        shard = self.shard
        return len(shard.extents) == 1 and not shard.header_bytes and chunks.chunk_count(shard.runs[0].tensor) == 1

    @property
    def frozen(self) -> bool:
        """Whether the shard holds only tensors that training does not change."""
        shard = self.shard  # the first one that is not decides, and there may be many
        return all(one.spec.frozen for one in shard.placements) and all(run.tensor.spec.frozen for run in shard.runs)

    def known(self) -> ReusableFile:
        """Describe the file as the next save compares with it."""
        seconds = tuple(digest for _, digest in sorted(self.seconds.items()))
        return ReusableFile(self.record(), tuple(map(written_extent, self.parts())), self.layers or (), seconds)

    def equal(self, old: ReusableFile, number: int, found: StagedDigests) -> bool:
        """Whether extent ``number``, whose digests are ``found``, has the old file's bytes."""
        record, second = old.ordered[number], self.seconds.get(number)
        return record.staged_digests == found and (second is None or old.seconds[number] == second)

    def place(self, item: EncodedChunk) -> int:
        """Give a frame its place in the file and return the offset. Where it was the frame's turn, the next one in the
        layout's order has the turn now."""
        offset = self.next_offset
        self.next_offset += padded(item.frame.payload_bytes)
        self.records[item.number] = WrittenExtent(offset, 0, ())
        while self.next_in_order in self.records:
            self.next_in_order += 1
        return offset

    def extents(self) -> tuple[ExtentRecord, ...]:
        """List everything in the file, in file order."""
        return tuple(sorted([*self.parts(), *self.format_extents], key=lambda extent: extent.offset))

    def parts(self) -> list[ExtentRecord]:
        """List the layout's extents in its order, one record for each part between two digest boundaries."""
        return [
            part
            for number, extent in enumerate(self.shard.extents)
            for part in self.records[number].records(extent.digest_boundaries)
        ]

    def ordered(self) -> tuple[WrittenExtent, ...]:
        """List the layout's extents in its order, one record each."""
        return tuple(self.records[number] for number in range(len(self.shard.extents)))

    def record(self) -> FileRecord:
        """Return the manifest's record of the file as written."""
        layers = tuple(layer.name for layer in self.layers or ())
        extents = self.extents()
        order = order_of(extents, self.ordered()) if self.shard.header_bytes else ()
        return FileRecord(self.shard.file, self.nbytes, extents, self.shard.content_key, layers, order)


def progress_of(layout: Layout) -> list[ShardProgress]:
    """Make the ``ShardProgress`` of every shard, none of it written yet."""
    found: list[ShardProgress] = []
    first = 0
    for shard in layout.shards:
        progress = ShardProgress(shard, first, len(shard.extents), shard.header_bytes)
        progress.finished = not shard.extents
        found.append(progress)
        first += len(shard.extents)
    return found
