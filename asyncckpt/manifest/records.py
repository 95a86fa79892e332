"""These records say what a checkpoint is made of, as its manifest does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from asyncckpt.types import ContentDigest, Extent, JsonValue, StagedDigests

if TYPE_CHECKING:
    from asyncckpt.manifest.parts import Parts


@dataclass(frozen=True, slots=True)
class ExtentRecord:
    """``ExtentRecord`` is a byte range of a file with the ``digest`` of its bytes. Where it is an encoded chunk,
    ``content`` is the digest of what was encoded, else None. ``payload_bytes`` counts its bytes without padding, and is
    0 where it has no padding."""

    offset: int
    nbytes: int
    digest: str
    content: ContentDigest | None = None
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WrittenExtent:
    """An extent of a layout as it lies in a file. ``digests`` has one for each part between two cuts; see
    ``ExtentRecord`` for the rest."""

    offset: int
    nbytes: int
    digests: tuple[str, ...]
    content: ContentDigest | None = None
    payload_bytes: int = 0

    @property
    def staged_digests(self) -> StagedDigests:
        """The digests that the extent had when it was staged."""
        return self.content or self.digests

    def records(self, cuts: Sequence[int]) -> list[ExtentRecord]:
        """Make one record for each part between two cuts: that is what the manifest lists."""
        if not cuts:
            return [ExtentRecord(self.offset, self.nbytes, self.digests[0], self.content, self.payload_bytes)]
        edges = itertools.pairwise((0, *cuts, self.nbytes))
        return [
            ExtentRecord(self.offset + begin, end - begin, digest)
            for (begin, end), digest in zip(edges, self.digests, strict=True)
        ]


def written_extent(record: ExtentRecord) -> WrittenExtent:
    """Make an extent of a record that is one part."""
    return WrittenExtent(record.offset, record.nbytes, (record.digest,), record.content, record.payload_bytes)


def join_records(records: Sequence[WrittenExtent], extents: Sequence[Extent]) -> tuple[WrittenExtent, ...] | None:
    """Join the parts that lie between two cuts again: one for each of a layout's extents. None where the extents were
    cut differently."""
    found: list[WrittenExtent] = []
    at = 0
    for extent in extents:
        size = len(extent.digest_boundaries) + 1
        parts, at = records[at : at + size], at + size
        edges = (
            extent.offset,
            *(extent.offset + cut for cut in extent.digest_boundaries),
            extent.offset + extent.nbytes,
        )
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
    """``FileRecord`` is a file of the checkpoint, which its extents cover from the first byte to the last.
    ``content_key`` is ``ShardFile.content_key``. ``bases`` lists the files, oldest first, whose chunks must be XORed
    with this one's to give the data. ``order`` says which extent each chunk is; where it is empty, chunk ``n`` is
    extent ``n + 1``, as the header is extent 0."""

    name: str
    nbytes: int
    extents: tuple[ExtentRecord, ...]
    content_key: str = ""
    bases: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def chunk(self, number: int) -> ExtentRecord:
        """Return the extent that is chunk ``number`` of the file, counted from 0."""
        return self.extents[self.order[number] if self.order else number + 1]

    def chunk_numbers(self) -> Mapping[int, int]:
        """Map the index of each extent that is a chunk to the number of that chunk."""
        order = self.order or range(1, len(self.extents))
        return {extent: chunk for chunk, extent in enumerate(order)}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """``TensorRecord`` is a stored tensor that lies in the bytes ``[begin, end)`` of a file."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.end - self.begin

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that hold the tensor."""
        return (self.file,)


@dataclass(frozen=True, slots=True)
class PartRecord:
    """``PartRecord`` says which extents of a file are consecutive chunks of a tensor, by their indices."""

    file: str
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkedRecord:
    """``ChunkedRecord`` is a stored tensor that is cut into chunks, as ``types.Chunking`` says. A chunk is encoded with
    the checkpoint's codec where its extent has a content digest."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunk_bytes: int
    run_bytes: int
    padded: bool
    parts: tuple[PartRecord, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that hold the tensor."""
        return tuple(part.file for part in self.parts)

    def span(self, chunk: int) -> tuple[int, int]:
        """Return ``(begin, nbytes)``: which of the tensor's bytes the chunk with this number holds."""
        run, within = divmod(chunk, -(-self.run_bytes // self.chunk_bytes))
        begin = within * self.chunk_bytes
        return run * self.run_bytes + begin, min(self.chunk_bytes, self.run_bytes - begin)


@dataclass(frozen=True, slots=True)
class BoxRecord:
    """``BoxRecord`` is the part of a tensor that begins at ``offsets`` and has this ``shape``. It lies in row-major
    order in the bytes ``[begin, end)`` of a file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    def entry(self, tensor: str) -> str:
        """Return the name that the box has in the file's own header. ``tensor`` is ``component.fqn``."""
        ranges = (f"{begin}:{begin + size}" for begin, size in zip(self.offsets, self.shape, strict=True))
        return f"{tensor}[{','.join(ranges)}]"


@dataclass(frozen=True, slots=True)
class BoxedRecord:
    """``BoxedRecord`` is a stored tensor that lies in boxes, which tile it: each rank wrote the part that it held."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    boxes: tuple[BoxRecord, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that hold the tensor."""
        return tuple(dict.fromkeys(box.file for box in self.boxes))

    def boxes_in(self, begin: int, end: int) -> tuple[BoxRecord, ...]:
        """Return the boxes that hold the rows ``[begin, end)``, and maybe others; a tensor without dimensions is one
        row."""
        return self.boxes


StoredTensor: TypeAlias = TensorRecord | ChunkedRecord | BoxedRecord


@dataclass(frozen=True, slots=True)
class ComponentRecord:
    """``ComponentRecord`` is one component: ``kind`` says how it was captured, ``tensors`` has its stored tensors by
    name, and ``aliases`` maps the other names of tied tensors to those. ``type_name`` is the qualified name of the live
    object's class, or empty. ``strides`` has, in elements, those that a tensor had in memory where it was dense but not
    row-major; its bytes in the file are row-major."""

    kind: str
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]
    type_name: str = ""
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """``Manifest`` records a whole checkpoint; docs/format.md describes each field. ``metrics`` and ``config`` are the
    user's. ``sequence`` rises from save to save of a run, whatever their steps are: the largest is the newest. It is 0
    in manifests that are older than the field. ``parent`` is the attempt of the checkpoint that training came from, or
    empty where it began anew or nobody knows. ``names``: those that the save was given. ``assets``: which of the files
    the user gave. ``size_bytes`` and ``file_digest`` (``sha256:…``) are those of the
    manifest's own file. ``least_version``: readers of older format versions cannot read this checkpoint,
    whatever its tensors would ask for. ``derived``: what made it of other checkpoints, if it was no save: ``by`` names
    that (``average``, ``thin``), ``from`` lists these, each with its ``attempt``, ``step`` and ``name``. ``parts``:
    what ranks have listed beside the manifest, whose files ``files`` has, too; None where the manifest lists
    everything."""

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
    parent: str = ""
    names: tuple[str, ...] = ()
    assets: tuple[str, ...] = ()
    derived: Mapping[str, JsonValue] = field(default_factory=dict)
    least_version: int = field(default=1, compare=False)
    parts: Parts | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """The size of all files in bytes, the manifest's own included."""
        return sum(record.nbytes for record in self.files) + self.size_bytes
