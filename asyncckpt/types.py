"""The stages of a save hand these types to each other: tensor specifications, pieces of a snapshot, extents and shards
of a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

from asyncckpt.errors import InvalidOption

if TYPE_CHECKING:
    import mmap

    import torch


#: These have the buffer protocol (``collections.abc.Buffer`` needs Python 3.12).
Buffer: TypeAlias = "bytes | bytearray | memoryview | mmap.mmap"
JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

#: A chunk for a codec is staged behind room for a frame header: stored without compression, it is a frame where it
#: lies.
FRAME_HEADER_BYTES = 16
#: A shard of up to this size is written through the page cache at once: more calls would cost more than its bytes.
SMALL_SHARD_BYTES = 256 << 10
#: The file that makes a directory a checkpoint. It is written last.
MANIFEST_FILE = "manifest.json"
#: File offsets, extent boundaries and memory handed to O_DIRECT are multiples of this many bytes.
ALIGNMENT_BYTES = 4096
#: A reader takes no larger extent, because it reads each into memory as a whole.
MAX_EXTENT_BYTES = 1 << 30


class ContentDigest(NamedTuple):  # a manifest may have millions: a frozen dataclass takes twice as long to make
    """The digest of a chunk's data is taken over the image that the data was staged as. ``split``: that image had the
    data's bytes in planes, which gives the same data another digest."""

    hex: str
    split: bool = False


#: The digests of a staged extent: a chunk's one, or of any other extent one for each part between two cuts.
StagedDigests: TypeAlias = "ContentDigest | tuple[str, ...]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """``TensorSpec`` describes one global tensor: its ``name`` inside the component, the safetensors code of its
    ``dtype``, its global ``shape`` and size in bytes. ``frozen``: training does not change it. ``file``: the
    name of the file that it has to lie in, with nothing but others of this file, so that another library finds it;
    empty where the format chooses."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    frozen: bool = False
    file: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class RowOwners:
    """``RowOwners`` says how the rows of a global tensor are spread over ranks: each rank of ``holders[i]`` holds the
    rows ``[bounds[i], bounds[i + 1])``. Empty parts are left out; a scalar counts as one row. It is compared by
    identity, because thousands of tensors share a few of these. Where parts are no whole rows, elements stand for rows:
    the last of ``bounds`` says which."""

    bounds: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    #: Maps a rank to the index of the part that it holds.
    part_of_rank: Mapping[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        held = {rank: part for part, ranks in enumerate(self.holders) for rank in ranks}
        object.__setattr__(self, "part_of_rank", held)


@dataclass(slots=True)
class LocalTensor:
    """``LocalTensor`` is the contiguous part of a global tensor that this rank holds: ``tensor`` has the row-major
    bytes of the global one from ``begin`` on. ``rows`` says which ranks hold which rows, and is None where every rank
    that knows the name holds the whole tensor. ``span`` is the range of rows held here while nobody knows who holds the
    others.
    ``private``: nothing else can change the tensor. ``gather`` returns the whole tensor, and ``redistribute``, where it
    is given, the tensor itself, which ``tensor`` only stands in for until then; every rank that holds a part of it must
    call them. ``first_only``: copies may differ, and the first rank that holds one is right (a module's buffer)."""

    spec: TensorSpec
    tensor: torch.Tensor
    begin: int = 0
    rows: RowOwners | None = None
    span: tuple[int, int] | None = None
    private: bool = False
    gather: Callable[[], torch.Tensor] | None = None
    redistribute: Callable[[], torch.Tensor] | None = None
    first_only: bool = False


class Pieces(Sequence[LocalTensor]):
    """``Pieces`` are pieces whose parts lie in lists of their own: whole tensors that nobody divides. An item is made
    when it is asked for, because a state has tens of thousands at every save. ``first_only``: see ``LocalTensor``."""

    __slots__ = ("first_only", "specs", "tensors")

    def __init__(self, specs: list[TensorSpec], first_only: list[bool], tensors: list[torch.Tensor]) -> None:
        self.specs = specs
        self.first_only = first_only
        self.tensors = tensors

    @overload
    def __getitem__(self, index: int) -> LocalTensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[LocalTensor]: ...

    def __getitem__(self, index: int | slice) -> LocalTensor | list[LocalTensor]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self.tensors)))]
        return LocalTensor(self.specs[index], self.tensors[index], first_only=self.first_only[index])

    def __len__(self) -> int:
        return len(self.tensors)


def pieces_of(pieces: Sequence[LocalTensor]) -> Pieces:
    """Return the lists of what pieces have that are whole tensors. They share nothing with pieces that are listed one
    by one."""
    if isinstance(pieces, Pieces):
        return pieces
    return Pieces([p.spec for p in pieces], [p.first_only for p in pieces], [p.tensor for p in pieces])


@dataclass(slots=True)
class ComponentSnapshot:
    """``ComponentSnapshot`` is one captured component. ``kind`` says how it was captured (``module``, ``optimizer``,
    ``stateful``, ``tensor`` or ``plain``), ``tree`` holds its plain values, and ``aliases`` maps a tied tensor's other
    names to the name it is stored under. ``shared``: the ranks of a job hold parts or copies of one component;
    otherwise each rank has a component of its own under this name. ``type_name`` is the qualified name of the live
    object's class, or empty. ``strides`` has, in elements, those of the tensors that are dense but not row-major in
    memory; their bytes are stored in row-major order all the same. ``owner``: the rank whose copies are right, None
    where all must be equal. ``parameters``: the names of an optimizer's parameters, by group."""

    name: str
    kind: str
    pieces: Sequence[LocalTensor]
    aliases: dict[str, str]
    tree: JsonValue
    shared: bool = True
    type_name: str = ""
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    owner: int | None = None
    parameters: Sequence[Sequence[str]] = ()


@dataclass(slots=True)
class Snapshot:
    """``Snapshot`` is the captured training state: references to tensors, which are not copied, and trees of plain
    values, which are."""

    step: int
    components: list[ComponentSnapshot]

    def pieces(self) -> list[LocalTensor]:
        """Return the pieces of all components, in order; a ``Segment`` refers to them by index."""
        return [piece for component in self.components for piece in component.pieces]


@dataclass(frozen=True, slots=True)
class Segment:
    """``Segment`` says which bytes of a piece go into an extent: ``nbytes`` from ``source_offset`` of the piece go to
    ``extent_offset`` of the staged bytes. ``piece`` is an index into the snapshot's pieces."""

    piece: int
    source_offset: int
    extent_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """``Extent`` is a byte range of a shard's file that has digests of its own. It is staged and written by itself or,
    where it is no chunk, together with its neighbours (``stage/units.py``).

    ``shard`` is the index of the shard in its layout. The extent begins with the format's bytes ``header``; then come
    the bytes of ``segments``, and zeros after the last of them. They are staged ``block_offset`` bytes into the slot,
    so that an extent that begins in the middle of a block can be written past the page cache from the next block on.
    ``digest_boundaries`` are the places in it where one digest ends and the next begins, so that whoever needs a part
    reads only that part.

    Where ``item_bytes`` is not 0, the extent is a chunk for the codec, made of items of that size, and its data begins
    ``FRAME_HEADER_BYTES`` into the staged bytes. ``payload_bytes`` counts a chunk's bytes without padding. In a shard
    that is packed on write ``offset`` gives only the order.
    """

    shard: int
    offset: int
    nbytes: int
    header: bytes
    segments: tuple[Segment, ...]
    item_bytes: int = 0
    payload_bytes: int = 0
    block_offset: int = 0
    digest_boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorRange:
    """``TensorRange`` says that a whole tensor lies in the byte range ``[begin, end)`` of the shard's file. Where the
    file's tensor is a box of a larger one, ``part_of`` describes that one and ``offsets`` say where the box begins in
    it, one index for each dimension."""

    spec: TensorSpec
    begin: int
    end: int
    part_of: TensorSpec | None = None
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunking:
    """``Chunking`` says how a tensor is cut into chunks, which are contiguous parts of its row-major bytes.

    Its bytes are runs of ``run_bytes``. Each run is cut into chunks of ``chunk_bytes``; the last chunk of a run is
    shorter, or, where ``padded``, filled up with zeros. ``chunk_shape`` and ``shard_shape`` say the same as shapes of
    arrays, for zarr; they are empty for safetensors.
    """

    spec: TensorSpec
    chunk_bytes: int
    run_bytes: int
    padded: bool
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """``ChunkRun`` says that consecutive chunks of one tensor are ``count`` extents of a shard, from the one with index
    ``first`` on."""

    tensor: Chunking
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """``ShardFile`` is one file of a checkpoint that holds tensors of one component: whole ones (``placements``) or
    parts of chunked ones (``runs``).

    ``packed_on_write``: the extents get their offsets as they are written, after ``header_bytes`` for the format's
    header; ``nbytes`` is then the largest size that the file can have. ``content_key`` is a digest of everything but
    the tensors' values that decides the file's content; it is empty where the file is not packed on write.
    ``multi_writer``: several ranks write into the file, and ``extents`` are those of this rank. ``pieces``: of each
    placement, the index of what is copied there; ``header``: what a plain file begins with.
    """

    file: str
    component: str
    nbytes: int
    placements: tuple[TensorRange, ...]
    extents: Sequence[Extent]
    runs: tuple[ChunkRun, ...] = ()
    packed_on_write: bool = False
    header_bytes: int = 0
    content_key: str = ""
    multi_writer: bool = False
    pieces: tuple[int, ...] = ()
    header: bytes = b""


@dataclass(frozen=True, slots=True)
class WrittenRange:
    """``WrittenRange`` says where an extent of a shard that is packed on write was put in its file: it has
    ``payload_bytes`` bytes, and ``nbytes`` with its padding."""

    offset: int
    nbytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """``Layout`` lists all shards of a save, whose sizes ``nbytes`` adds up. It is a pure function of the names, shapes
    and dtypes of the global tensors and of the options. ``fingerprint`` is a digest of those names, shapes and dtypes.
    ``cache`` keeps what other stages compute from the layout once. ``of_rank``: the shared ``shards`` are files that
    this rank alone writes, and other ranks have others; ``nbytes`` are still those of all."""

    shards: tuple[ShardFile, ...]
    nbytes: int
    fingerprint: str
    cache: dict[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)
    of_rank: bool = False

    def extents(self) -> list[Extent]:
        """Return the extents of all shards, in order."""
        return [extent for shard in self.shards for extent in shard.extents]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutOptions:
    """These options decide a layout. ``shard_bytes``: data bytes after which a new shard begins. ``extent_bytes``: the
    largest extent, a multiple of 4096. ``by_rank``: each rank writes files of its own
    (``plan/per_rank_files.py``); with None, where that suits the job better. Raises ``InvalidOption`` for a size that
    cannot be used."""

    shard_bytes: int = 4 << 30
    extent_bytes: int = 8 << 20
    by_rank: bool | None = False

    def __post_init__(self) -> None:
        if type(self.shard_bytes) is not int or self.shard_bytes < 1:
            raise InvalidOption(f"shard_bytes must be a whole number of bytes >= 1, not {self.shard_bytes!r}")
        if type(self.extent_bytes) is not int or self.extent_bytes < 1 or self.extent_bytes % ALIGNMENT_BYTES:
            raise InvalidOption(f"extent_bytes must be a positive multiple of {ALIGNMENT_BYTES}")
        if self.extent_bytes > MAX_EXTENT_BYTES:
            raise InvalidOption(f"extent_bytes must be at most {MAX_EXTENT_BYTES}, not {self.extent_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseOptions:
    """Says how a run shows that its writer is alive.

    ``beat_seconds``: how often the writer renews its lease. ``ttl_seconds``: how long a newcomer that cannot know
    better (from another host, or without locks) watches for a renewal before it takes the writer for dead.
    ``finish_seconds``: how long a newcomer waits at most while the background process of a trainer that was killed
    publishes what that had staged."""

    beat_seconds: float = 5.0
    ttl_seconds: float = 20.0
    finish_seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class Holder:
    """What is recorded of a run's writer. ``boot``: names the boot of its host. ``beat``: rises with each renewal.
    ``released``: it has given the run back. ``lock``: the inode of the lock file that it holds, 0 where it has none.
    ``finishing``: the trainer is gone, and this is its background process, which ends once it has published what was
    staged."""

    owner: str
    host: str
    boot: str
    pid: int
    beat: int
    released: bool
    lock: int = 0
    finishing: bool = False

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"
