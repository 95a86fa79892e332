"""What the stages hand to each other: tensor specifications, pieces of a snapshot, extents and shards of a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from asyncckpt.errors import InvalidOption

if TYPE_CHECKING:
    import mmap

    import torch


#: What the buffer protocol takes here (``collections.abc.Buffer`` needs Python 3.12).
Buffer: TypeAlias = "bytes | bytearray | memoryview | mmap.mmap"
JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

#: Room for a frame header before a chunk that is staged for a codec: stored as it is, it becomes a frame where it lies.
LEAD_BYTES = 16
#: A shard of up to this size is one write through the page cache and its fsync: more calls cost more than its bytes.
SMALL_SHARD_BYTES = 256 << 10
#: File offsets, extent boundaries and memory handed to O_DIRECT are multiples of this many bytes.
ALIGNMENT_BYTES = 4096


class ContentDigest(NamedTuple):  # a manifest may have millions: a frozen dataclass takes twice as long to make
    """The digest of a chunk's data is taken over the image that the data was staged as. ``split``: that image had the
    data's bytes in planes, which gives the same data another digest."""

    hex: str
    split: bool = False


#: The digests of a staged extent: a chunk's one, or of any other extent one for each part between two cuts.
StagedDigests: TypeAlias = "ContentDigest | tuple[str, ...]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One global tensor: its name inside the component, the safetensors dtype code, and its global shape. ``frozen``:
    training does not change it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    frozen: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """How the rows of a global tensor are spread over ranks: ``[bounds[i], bounds[i + 1])`` lie on each of
    ``holders[i]``. Empty parts are left out; a scalar counts as one row. Compared by identity: thousands of tensors
    share a few of these."""

    bounds: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    #: The part that a rank holds: its number.
    part_of: Mapping[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        held = {rank: part for part, ranks in enumerate(self.holders) for rank in ranks}
        object.__setattr__(self, "part_of", held)


@dataclass(slots=True)
class Piece:
    """The contiguous part of a global tensor that this rank holds: its row-major bytes from ``begin`` on. ``rows``: how
    the others hold the rest; None where every rank that knows the name holds the whole tensor. ``span`` are the rows
    that are here where nobody knows yet who holds the others. ``private``: nobody else can change it. ``gather`` makes
    the whole tensor, on all ranks that hold a part of it."""

    spec: TensorSpec
    tensor: torch.Tensor
    begin: int = 0
    rows: Rows | None = None
    span: tuple[int, int] | None = None
    private: bool = False
    gather: Callable[[], torch.Tensor] | None = None


@dataclass(slots=True)
class ComponentSnapshot:
    """One captured component. ``aliases`` maps a tied tensor's other names to the name it is stored under. ``shared``:
    one for all ranks of the job, which hold parts or copies of it; otherwise each rank has its own."""

    name: str
    kind: str
    pieces: list[Piece]
    aliases: dict[str, str]
    tree: JsonValue
    shared: bool = True


@dataclass(slots=True)
class Snapshot:
    """The captured training state: references to tensors (no copies) and trees of plain values (copies)."""

    step: int
    components: list[ComponentSnapshot]

    def pieces(self) -> list[Piece]:
        return [piece for component in self.components for piece in component.pieces]


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of one tensor inside one extent: ``piece`` indexes the snapshot's pieces, offsets and length in bytes."""

    piece: int
    source_offset: int
    extent_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a shard: staged, hashed and written as a unit. ``header`` are leading format bytes; what no
    segment covers after the last one is zeros.

    The bytes are staged ``lead`` bytes into the slot, so that an extent that begins in the middle of a block can be
    written past the page cache from the next block on. ``cuts``: where in it one digest ends and the next begins, so
    that a reader who needs a part does not have to read it all.

    ``item_bytes`` over 0: a chunk that the codec encodes, of items of that size; its data begins ``LEAD_BYTES`` into
    the staged bytes. ``stored`` are the bytes of it that mean something; in a shard that is placed while it is written
    ``offset`` says only the order.
    """

    shard: int
    offset: int
    nbytes: int
    header: bytes
    segments: tuple[Segment, ...]
    item_bytes: int = 0
    stored: int = 0
    lead: int = 0
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a whole tensor lies: byte range ``[begin, end)`` of the shard's file. ``part_of``: where the file's tensor
    is a box of a larger one, that one, and the box's ``offsets`` in it."""

    spec: TensorSpec
    begin: int
    end: int
    part_of: TensorSpec | None = None
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a tensor is cut into chunks: contiguous parts of its row-major bytes.

    Its bytes are runs of ``run_bytes``; each run is cut into chunks of ``chunk_bytes``, the last one of a run shorter,
    or, where ``padded``, filled up with zeros. ``grid`` and ``chunk_shape`` say the same as shapes (zarr).
    """

    spec: TensorSpec
    chunk_bytes: int
    run_bytes: int
    padded: bool
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """Consecutive chunks of one tensor in one shard: ``count`` extents of it from number ``first``."""

    tensor: Chunking
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint that holds tensors of one component: whole ones (``placements``) and chunked ones.

    ``floating``: extents get their places as they are written, after ``reserved_bytes`` for the format's header;
    ``nbytes`` is then the most the file can have. ``plan`` is a digest of all this, empty where the file's own bytes
    say it. ``shared``: several ranks write into the file, and ``extents`` are only those of this one.
    """

    file: str
    component: str
    nbytes: int
    placements: tuple[Placement, ...]
    extents: tuple[Extent, ...]
    runs: tuple[ChunkRun, ...] = ()
    floating: bool = False
    reserved_bytes: int = 0
    plan: str = ""
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an extent of a floating shard came to lie: ``stored`` bytes of meaning, ``nbytes`` with padding."""

    offset: int
    nbytes: int
    stored: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards of a save. A pure function of the global names, shapes and dtypes and of the layout options."""

    shards: tuple[Shard, ...]
    nbytes: int
    fingerprint: str
    cache: dict[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)

    def extents(self) -> list[Extent]:
        return [extent for shard in self.shards for extent in shard.extents]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutOptions:
    """``shard_bytes``: data bytes after which a new shard begins. ``extent_bytes``: the unit of staging, hashing and
    writing, a multiple of 4096. ``by_rank``: a file is written by one rank alone (``by_rank.py``)."""

    shard_bytes: int = 4 << 30
    extent_bytes: int = 8 << 20
    by_rank: bool = False

    def __post_init__(self) -> None:
        if type(self.shard_bytes) is not int or self.shard_bytes < 1:
            raise InvalidOption(f"shard_bytes must be a whole number of bytes >= 1, not {self.shard_bytes!r}")
        if type(self.extent_bytes) is not int or self.extent_bytes < 1 or self.extent_bytes % ALIGNMENT_BYTES:
            raise InvalidOption(f"extent_bytes must be a positive multiple of {ALIGNMENT_BYTES}")
