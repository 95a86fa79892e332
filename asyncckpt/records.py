"""What a checkpoint is made of, as its manifest records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncckpt.protocols import JsonValue


@dataclass(frozen=True, slots=True)
class ExtentRecord:
    """A digested byte range of a file. ``content`` is the digest of what was encoded into it, empty where that is
    ``digest``; ``stored`` are its bytes without padding, 0 where there is none."""

    offset: int
    nbytes: int
    digest: str
    content: str = ""
    stored: int = 0


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


StoredTensor: TypeAlias = TensorRecord | ChunkedRecord


@dataclass(frozen=True, slots=True)
class ComponentRecord:
    """One component: how it was captured, its stored tensors, and the other names of tied ones."""

    kind: str
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A whole checkpoint, as recorded. ``metrics`` and ``config`` are the user's; ``environment`` is recorded.
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

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest's own included."""
        return sum(record.nbytes for record in self.files) + self.size_bytes
