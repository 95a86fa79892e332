"""The hand-over types between the rooms, and the contracts a backend or format has to keep. Nothing here does work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

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


@runtime_checkable
class Stateful(Protocol):
    """torch's ``Stateful``: anything that can give and take its state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


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


class Codec(Protocol):
    """Lossless: bytes of one chunk ↔ a frame. Stateless, thread-safe, and never holds the GIL for long."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Its options, as they go into the manifest."""

    def encode(self, data: Any, item_bytes: int, out: Any) -> int:
        """Encode a uint8 array of items of ``item_bytes`` into another; the frame's size. Never more than the data
        and ``frames.FRAME_OVERHEAD_BYTES``."""

    def attempt(self, data: Any, item_bytes: int, out: Any) -> int:
        """As ``encode``; 0 where the data had better lie as it is in a frame of ``frames.stored_frame``."""

    def decode(self, frame: Any, out: Any) -> None:
        """Decode a whole frame into exactly ``out``. Raises ``CheckpointDamaged``, before anything over ``out``'s
        size is produced."""

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        """The zarr v3 bytes-to-bytes codecs that read these frames."""


class ShardFormat(Protocol):
    """What a shard's bytes are. Stateless and thread-safe."""

    name: str

    def shards(
        self,
        component: str,
        specs: Sequence[TensorSpec],
        first_piece: int,
        first_shard: int,
        codec: Codec,
        options: LayoutOptions,
    ) -> list[Shard]:
        """One component's shards, numbered from ``first_shard``; ``specs[i]`` is piece ``first_piece + i``. Pure."""

    def seal(self, shard: Shard, placed: Sequence[Placed], codec: Codec) -> tuple[bytes, bytes]:
        """The head (into ``reserved_bytes``) and tail of a floating shard whose extents are ``placed``."""

    def small_files(self, component: str, shards: Sequence[Shard], codec: Codec) -> dict[str, bytes]:
        """What readers of the format look for beside the shards: index files, metadata."""


class ShardWriter(Protocol):
    """One shard file being written. ``write_at`` is thread-safe and blocks; an error in any call is final."""

    def write_at(self, view: memoryview, nbytes: int, offset: int) -> None:
        """Write ``nbytes`` of ``view`` at ``offset``; the view begins as far into a block of ``ALIGNMENT_BYTES`` of
        memory as the offset into one of the file, and is padded to the end of its last block."""

    def finish(self, nbytes: int) -> None:
        """Cut the file to ``nbytes``, fsync and close it."""

    def abort(self) -> None:
        """Close without syncing. Idempotent; never raises."""


class Attempt(Protocol):
    """One unpublished checkpoint in a directory of its own. Never reused."""

    uuid: str
    path: str

    def create_shard(self, file: str, nbytes: int, *, shared: bool = False) -> ShardWriter:
        """A new file of at most ``nbytes``; directories in its name are made. ``shared``: other ranks write into it
        too, so it may be there already, and not a byte but those asked for is touched."""

    def link(self, source: Reader, file: str, nbytes: int, name: str) -> bool:
        """Take over another checkpoint's file of that size as ``name``, without copying it; False where the file system
        cannot. Raises ``CheckpointDamaged`` where the file is not what it was."""

    async def write_small(self, files: Mapping[str, bytes]) -> None:
        """Create, write and fsync small files, all at once."""

    def sync_directory(self) -> None:
        """Make every name written so far durable."""

    def publish(self, name: str, *, replace: bool) -> None:
        """Give the directory its final name, atomically, and make that durable. Raises ``StepExists``."""

    def close(self) -> None:
        """Write nothing more; what is there stays. Idempotent; never raises."""

    def discard(self) -> None:
        """Remove what was written. Idempotent; never raises."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A checkpoint that lies under a hidden name: the save with the uuid ``attempt`` takes the place of ``name``."""

    hidden: str
    name: str
    attempt: str


class Store(Protocol):
    """Where a run's checkpoints live. Thread-safe; every call may block on the device."""

    def begin(self, step: int, attempt: str, *, shared: bool = False) -> Attempt:
        """A new attempt's directory; ``shared``: another rank may have made it already."""

    def free_bytes(self) -> int: ...

    def names(self) -> list[str]:
        """Candidate checkpoints' names, in no order. Temporary and trash names are not among them."""

    def identity(self, name: str) -> int | None:
        """What is there under this name, of whatever kind: another number where it was replaced; None for nothing."""

    def listing(self, name: str) -> Mapping[str, os.stat_result]:
        """A directory's entries, links not followed; empty where there is no such directory."""

    def open(self, name: str) -> Reader: ...

    def remove(self, name: str) -> bool:
        """Rename to trash, then delete. False where a reader holds the checkpoint (nothing is done then)."""

    def set_aside(self, name: str) -> str:
        """Move a damaged checkpoint out of the way without deleting it; the new name."""

    def make_way(self, name: str, attempt: str) -> Replaced | None:
        """Hide a checkpoint, durably, that the save with that attempt uuid takes the place of; None where there is none
        of that name."""

    def put_back(self, replaced: Replaced) -> bool:
        """Give a hidden checkpoint its name back, durably; False where that failed, which is logged."""

    def replaced(self) -> list[Replaced]:
        """The checkpoints that are hidden."""


class Reader(Protocol):
    """An open checkpoint, protected from retention until closed. Thread-safe."""

    name: str
    path: str

    def files(self) -> dict[str, int]:
        """Regular files and their sizes. Raises ``CheckpointDamaged`` on anything that is no regular file."""

    def files_nbytes(self, file: str) -> int:
        """One file's size. Raises ``CheckpointDamaged`` where it is missing or no regular file."""

    def read_small(self, file: str, limit_bytes: int) -> bytes: ...

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        """Read into an aligned, padded buffer, past the page cache where the file system can; bytes read."""

    def close(self) -> None: ...


class Digest(Protocol):
    """A digest over buffers, one after the other: bytes in, lowercase hex out. Releases the GIL; thread-safe."""

    def __call__(self, *parts: Buffer) -> str: ...
