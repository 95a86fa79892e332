"""``Progress`` records how far one shard of a save has come, and gives its frames their places in the file."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from asyncckpt.formats import chunking as chunks
from asyncckpt.manifest.records import ExtentRecord, FileRecord, WrittenExtent, written_extent
from asyncckpt.memory.arena import Slot
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import ShardWriter
from asyncckpt.read.delta import order_of
from asyncckpt.stage.image import Frame
from asyncckpt.types import ContentDigest, Layout, Shard, StagedDigests, TensorSpec
from asyncckpt.write.reuse import KnownFile


@dataclass(slots=True)
class Parked:
    """An encoded chunk on its way to the disk. ``number``: the chunk's among the shard's extents. ``slot``: the memory
    to release once it is written, None where that has happened. ``content``: the digest of what was encoded."""

    number: int
    slot: Slot | None
    frame: Frame
    content: ContentDigest


@dataclass(slots=True)
class Progress:
    """Tracks one shard. ``records`` are its extents by number; ``edges`` those that the format adds; ``old`` is the
    previous checkpoint's file that it may be equal to, ``matched`` are the extents found equal; ``layers`` are the
    files that its chunks are differences to (None: not decided); ``seconds`` are the extents' second digests, where
    one is not enough. Not thread-safe."""

    shard: Shard
    first: int
    missing: int
    cursor: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    old: KnownFile | None = None
    layers: tuple[FileRecord, ...] | None = None
    writer: ShardWriter | None = None
    matched: list[int] = field(default_factory=list)
    matching: bool = False
    linked: bool = False
    finished: bool = False
    turn: int = 0
    parked: dict[int, Parked] = field(default_factory=dict)
    records: dict[int, WrittenExtent] = field(default_factory=dict)
    edges: list[ExtentRecord] = field(default_factory=list)
    seconds: dict[int, StagedDigests] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def alone(self) -> bool:
        """Whether the file is one frame and nothing else; such a file is not padded."""
        shard = self.shard
        return len(shard.extents) == 1 and not shard.reserved_bytes and chunks.chunk_count(shard.runs[0].tensor) == 1

    @property
    def frozen(self) -> bool:
        """Whether the shard holds only tensors that training does not change."""
        return all(spec.frozen for spec in specs_of(self.shard))

    def known(self) -> KnownFile:
        """Describe the file as the next save compares with it."""
        seconds = tuple(digest for _, digest in sorted(self.seconds.items()))
        return KnownFile(self.record(), tuple(map(written_extent, self.parts())), self.layers or (), seconds)

    def equal(self, old: KnownFile, number: int, found: StagedDigests) -> bool:
        """Whether extent ``number``, whose digests are ``found``, has the old file's bytes."""
        record, second = old.ordered[number], self.seconds.get(number)
        return record.staged_digests == found and (second is None or old.seconds[number] == second)

    def place(self, item: Parked) -> int:
        """Give a frame its place in the file and return the offset. Where it was the frame's turn, the next one in the
        layout's order has the turn now."""
        offset = self.cursor
        self.cursor += padded(item.frame.stored)
        self.records[item.number] = WrittenExtent(offset, 0, ())
        while self.turn in self.records:
            self.turn += 1
        return offset

    def extents(self) -> tuple[ExtentRecord, ...]:
        """List everything in the file, in file order."""
        return tuple(sorted([*self.parts(), *self.edges], key=lambda extent: extent.offset))

    def parts(self) -> list[ExtentRecord]:
        """List the layout's extents in its order, one record for each part between two cuts."""
        return [
            part
            for number, extent in enumerate(self.shard.extents)
            for part in self.records[number].records(extent.cuts)
        ]

    def ordered(self) -> tuple[WrittenExtent, ...]:
        """List the layout's extents in its order, one record each."""
        return tuple(self.records[number] for number in range(len(self.shard.extents)))

    def record(self) -> FileRecord:
        """Return the manifest's record of the file as written."""
        layers = tuple(layer.name for layer in self.layers or ())
        extents = self.extents()
        order = order_of(extents, self.ordered()) if self.shard.reserved_bytes else ()
        return FileRecord(self.shard.file, self.nbytes, extents, self.shard.plan, layers, order)


def progress_of(layout: Layout) -> list[Progress]:
    """Make the ``Progress`` of every shard, none of it written yet."""
    found: list[Progress] = []
    first = 0
    for shard in layout.shards:
        progress = Progress(shard, first, len(shard.extents), shard.reserved_bytes)
        progress.finished = not shard.extents
        found.append(progress)
        first += len(shard.extents)
    return found


def specs_of(shard: Shard) -> list[TensorSpec]:
    """List the tensors that a shard holds, whole or in part."""
    return [placement.spec for placement in shard.placements] + [run.tensor.spec for run in shard.runs]
