"""How far one shard of a save has come, and where its frames go."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from asyncckpt.formats import chunking as chunks
from asyncckpt.manifest.records import ExtentRecord, FileRecord, split_record
from asyncckpt.memory.arena import Slot
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import ShardWriter
from asyncckpt.read.delta import order_of
from asyncckpt.stage.image import Frame
from asyncckpt.types import Layout, Shard, TensorSpec
from asyncckpt.write.reuse import KnownFile


@dataclass(slots=True)
class Parked:
    """An encoded chunk on its way to the disk. ``slot`` is to be released after it, None where it is already."""

    number: int
    slot: Slot | None
    frame: Frame
    content: str


@dataclass(slots=True)
class Progress:
    """One shard. ``records`` are its extents by number; ``edges`` what the format adds; ``old`` the previous
    checkpoint's file that it may be equal to, ``matched`` the extents that are; ``layers`` the files that its chunks
    are differences to (None: not decided); ``seconds`` the extents' second digests, where one is not enough. Not
    thread-safe."""

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
    records: dict[int, ExtentRecord] = field(default_factory=dict)
    edges: list[ExtentRecord] = field(default_factory=list)
    seconds: dict[int, str] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def alone(self) -> bool:
        """Whether the file is one frame and nothing else: then it is not padded."""
        shard = self.shard
        return len(shard.extents) == 1 and not shard.reserved_bytes and chunks.chunk_count(shard.runs[0].tensor) == 1

    @property
    def frozen(self) -> bool:
        """Whether training changes nothing of it."""
        return all(spec.frozen for spec in specs_of(self.shard))

    def known(self) -> KnownFile:
        """The file as the next save compares with it."""
        seconds = tuple(digest for _, digest in sorted(self.seconds.items()))
        return KnownFile(self.record(), tuple(self.parts()), self.layers or (), seconds)

    def equal(self, old: KnownFile, number: int, found: str) -> bool:
        """Whether an extent, of this content digest, is the old file's."""
        record, second = old.ordered[number], self.seconds.get(number)
        return (record.content or record.digest) == found and (second is None or old.seconds[number] == second)

    def place(self, item: Parked) -> int:
        """The offset of a frame; those after it in the layout's order may follow where it was its turn."""
        offset = self.cursor
        self.cursor += padded(item.frame.stored)
        self.records[item.number] = ExtentRecord(offset, 0, "")
        while self.turn in self.records:
            self.turn += 1
        return offset

    def extents(self) -> tuple[ExtentRecord, ...]:
        """Everything in the file, in file order."""
        return tuple(sorted([*self.parts(), *self.edges], key=lambda extent: extent.offset))

    def parts(self) -> list[ExtentRecord]:
        """The layout's extents, each part of one a record of its own, in its order."""
        return [
            part
            for number, extent in enumerate(self.shard.extents)
            for part in split_record(self.records[number], extent.cuts)
        ]

    def ordered(self) -> tuple[ExtentRecord, ...]:
        """The layout's extents, in its order."""
        return tuple(self.records[number] for number in range(len(self.shard.extents)))

    def record(self) -> FileRecord:
        """The file as written."""
        layers = tuple(layer.name for layer in self.layers or ())
        extents = self.extents()
        order = order_of(extents, self.ordered()) if self.shard.reserved_bytes else ()
        return FileRecord(self.shard.file, self.nbytes, extents, self.shard.plan, layers, order)


def progress_of(layout: Layout) -> list[Progress]:
    """Of every shard, at its beginning."""
    found: list[Progress] = []
    first = 0
    for shard in layout.shards:
        progress = Progress(shard, first, len(shard.extents), shard.reserved_bytes)
        progress.finished = not shard.extents
        found.append(progress)
        first += len(shard.extents)
    return found


def specs_of(shard: Shard) -> list[TensorSpec]:
    """The tensors that a shard holds, whole or in part."""
    return [placement.spec for placement in shard.placements] + [run.tensor.spec for run in shard.runs]
