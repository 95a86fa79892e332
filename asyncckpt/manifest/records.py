"""What a checkpoint is made of, as its manifest records it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncckpt.types import ContentDigest, Extent, JsonValue, StagedDigests


@dataclass(frozen=True, slots=True)
class ExtentRecord:
    """A digested byte range of a file. ``content`` is the digest of the data that was encoded into it, None where
    nothing was; ``stored`` are its bytes without padding, 0 where there is none."""

    offset: int
    nbytes: int
    digest: str
    content: ContentDigest | None = None
    stored: int = 0


@dataclass(frozen=True, slots=True)
class WrittenExtent:
    """An extent of a layout as it lies in a file. ``digests`` has one for each part between two cuts; see
    ``ExtentRecord`` for the rest."""

    offset: int
    nbytes: int
    digests: tuple[str, ...]
    content: ContentDigest | None = None
    stored: int = 0

    @property
    def staged_digests(self) -> StagedDigests:
        """The digests that the extent had when it was staged."""
        return self.content or self.digests

    def records(self, cuts: Sequence[int]) -> list[ExtentRecord]:
        """Make one record for each part between two cuts: that is what the manifest lists."""
        if not cuts:
            return [ExtentRecord(self.offset, self.nbytes, self.digests[0], self.content, self.stored)]
        edges = itertools.pairwise((0, *cuts, self.nbytes))
        return [
            ExtentRecord(self.offset + begin, end - begin, digest)
            for (begin, end), digest in zip(edges, self.digests, strict=True)
        ]


def written_extent(record: ExtentRecord) -> WrittenExtent:
    """Make an extent of a record that is one part."""
    return WrittenExtent(record.offset, record.nbytes, (record.digest,), record.content, record.stored)


def join_records(records: Sequence[WrittenExtent], extents: Sequence[Extent]) -> tuple[WrittenExtent, ...] | None:
    """Join the parts that lie between two cuts again: one for each of a layout's extents. None where the extents were
    cut differently."""
    found: list[WrittenExtent] = []
    at = 0
    for extent in extents:
        size = len(extent.cuts) + 1
        parts, at = records[at : at + size], at + size
        edges = (extent.offset, *(extent.offset + cut for cut in extent.cuts), extent.offset + extent.nbytes)
        if [(part.offset, part.offset + part.nbytes) for part in parts] != list(itertools.pairwise(edges)):
            return None
        if size == 1:
            found += parts
        else:
            digests = tuple(digest for part in parts for digest in part.digests)
            found.append(WrittenExtent(extent.offset, extent.nbytes, digests))
    return tuple(found) if at == len(records) else None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint, covered from its first byte to its last by extents. ``plan``: see ``Shard.plan``.
    ``bases``: the files, oldest first, whose chunks have to be XORed to this one's to give the data; ``order``: which
    extent each chunk is, empty where chunk ``n`` is extent ``n + 1``, after the header."""

    name: str
    nbytes: int
    extents: tuple[ExtentRecord, ...]
    plan: str = ""
    bases: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def chunk(self, number: int) -> ExtentRecord:
        """The extent that chunk ``number`` of the file is."""
        return self.extents[self.order[number] if self.order else number + 1]

    def chunk_numbers(self) -> Mapping[int, int]:
        """Which chunk of the file each extent is."""
        order = self.order or range(1, len(self.extents))
        return {extent: chunk for chunk, extent in enumerate(order)}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where a stored tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)


@dataclass(frozen=True, slots=True)
class PartRecord:
    """Consecutive chunks of a tensor: numbers of extents of a file."""

    file: str
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkedRecord:
    """A stored tensor that is cut into chunks; see ``protocols.Chunking``. A chunk whose extent has a content digest is
    encoded with the checkpoint's codec."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunk_bytes: int
    run_bytes: int
    padded: bool
    parts: tuple[PartRecord, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(part.file for part in self.parts)

    def span(self, chunk: int) -> tuple[int, int]:
        """``(begin, nbytes)``: the tensor's bytes that a chunk holds."""
        run, within = divmod(chunk, -(-self.run_bytes // self.chunk_bytes))
        begin = within * self.chunk_bytes
        return run * self.run_bytes + begin, min(self.chunk_bytes, self.run_bytes - begin)


@dataclass(frozen=True, slots=True)
class BoxRecord:
    """The part of a tensor that begins at ``offsets`` and has this shape, row-major in a file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    def entry(self, tensor: str) -> str:
        """What the file's own header calls it; ``tensor`` is the qualified name."""
        ranges = (f"{begin}:{begin + size}" for begin, size in zip(self.offsets, self.shape, strict=True))
        return f"{tensor}[{','.join(ranges)}]"


@dataclass(frozen=True, slots=True)
class BoxedRecord:
    """A stored tensor that lies in boxes, which tile it: each rank wrote what it had."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    boxes: tuple[BoxRecord, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(box.file for box in self.boxes))


StoredTensor: TypeAlias = TensorRecord | ChunkedRecord | BoxedRecord


@dataclass(frozen=True, slots=True)
class ComponentRecord:
    """One component: how it was captured, its stored tensors, and the other names of tied ones."""

    kind: str
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A whole checkpoint, as recorded. ``metrics`` and ``config`` are the user's; ``environment`` is recorded.
    ``sequence`` rises from save to save of a run, whatever their steps are: the largest is the newest. It is 0 in
    manifests that are older than the field.
    ``size_bytes`` and ``file_digest`` (``sha256:…``) are those of the manifest's own file."""

    step: int
    name: str
    attempt: str
    kind: str
    created_unix_seconds: float
    world_size: int
    shard_format: str
    digest: str
    layout: str
    metrics: Mapping[str, float]
    config: JsonValue
    environment: Mapping[str, JsonValue]
    files: tuple[FileRecord, ...]
    components: Mapping[str, ComponentRecord]
    codec: str = "none"
    codec_options: Mapping[str, JsonValue] = field(default_factory=dict)
    size_bytes: int = field(default=0)
    file_digest: str = ""
    sequence: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest's own included."""
        return sum(record.nbytes for record in self.files) + self.size_bytes
