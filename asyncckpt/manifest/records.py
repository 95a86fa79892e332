"""What a checkpoint is made of, as its manifest records it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncckpt.types import Extent, JsonValue

#: Between the digests of an extent's parts, while it is one record.
DIGEST_SEPARATOR = ","


@dataclass(frozen=True, slots=True)
class ExtentRecord:
    """A digested byte range of a file. ``content`` is the digest of what was encoded into it, empty where that is
    ``digest``; ``stored`` are its bytes without padding, 0 where there is none."""

    offset: int
    nbytes: int
    digest: str
    content: str = ""
    stored: int = 0


def split_record(record: ExtentRecord, cuts: Sequence[int]) -> list[ExtentRecord]:
    """One record for each part of an extent: what the manifest lists."""
    if not cuts:
        return [record]
    edges = itertools.pairwise((0, *cuts, record.nbytes))
    found = record.digest.split(DIGEST_SEPARATOR)
    return [
        ExtentRecord(record.offset + begin, end - begin, digest)
        for (begin, end), digest in zip(edges, found, strict=True)
    ]


def join_records(records: Sequence[ExtentRecord], extents: Sequence[Extent]) -> tuple[ExtentRecord, ...] | None:
    """The other way round: one record for each of a file's extents; None where they were cut differently."""
    found: list[ExtentRecord] = []
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
            joined = DIGEST_SEPARATOR.join(part.digest for part in parts)
            found.append(ExtentRecord(extent.offset, extent.nbytes, joined))
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
