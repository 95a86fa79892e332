"""The hand-over types between the rooms, and the contracts a backend or format has to keep. Nothing here does work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import mmap

    import torch

#: What the buffer protocol takes here (``collections.abc.Buffer`` needs Python 3.12).
Buffer: TypeAlias = "bytes | bytearray | memoryview | mmap.mmap"
JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

#: File offsets, extent boundaries and memory handed to O_DIRECT are multiples of this many bytes.
ALIGNMENT_BYTES = 4096


@runtime_checkable
class Stateful(Protocol):
    """torch's ``Stateful``: anything that can give and take its state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One global tensor: its name inside the component, the safetensors dtype code, and its global shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(slots=True)
class Piece:
    """The contiguous part of a global tensor that this rank holds; ``offsets`` is its corner in the global shape, empty
    where the piece is the whole tensor."""

    spec: TensorSpec
    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(slots=True)
class ComponentSnapshot:
    """One captured component. ``aliases`` maps a tied tensor's other names to the name it is stored under."""

    name: str
    kind: str
    pieces: list[Piece]
    aliases: dict[str, str]
    tree: JsonValue


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
    """An aligned byte range of a shard: staged, hashed and written as a unit. ``header`` are leading format bytes."""

    shard: int
    offset: int
    nbytes: int
    header: bytes
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies: byte range ``[begin, end)`` of the shard's file."""

    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint that holds tensors of one component."""

    file: str
    component: str
    nbytes: int
    placements: tuple[Placement, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards of a save. A pure function of the global names, shapes and dtypes and of the layout options."""

    shards: tuple[Shard, ...]
    nbytes: int
    fingerprint: str
    cache: dict[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)

    def extents(self) -> list[Extent]:
        return [extent for shard in self.shards for extent in shard.extents]


class ShardFormat(Protocol):
    """What a shard's bytes are. Stateless and thread-safe."""

    name: str
    suffix: str

    def image(self, specs: Sequence[TensorSpec]) -> tuple[bytes, list[int], int]:
        """``(header, begins, nbytes)``: the leading bytes, each tensor's file offset, and the file's size."""

    def index(self, component: str, shards: Sequence[Shard]) -> tuple[str, bytes] | None:
        """The component's index file, ``(name, content)``, for readers that look for one."""


class ShardWriter(Protocol):
    """One shard file being written. ``write_at`` is thread-safe and blocks; an error in any call is final."""

    def write_at(self, view: memoryview, nbytes: int, offset: int) -> None:
        """Write ``nbytes`` of ``view`` at ``offset``; the view is aligned and padded to ``ALIGNMENT_BYTES``."""

    def finish(self) -> None:
        """Cut the file to its size, fsync and close it."""

    def abort(self) -> None:
        """Close without syncing. Idempotent; never raises."""


class Attempt(Protocol):
    """One unpublished checkpoint in a directory of its own. Never reused."""

    uuid: str
    path: str

    def create_shard(self, file: str, nbytes: int) -> ShardWriter: ...

    async def write_small(self, files: Mapping[str, bytes]) -> None:
        """Create, write and fsync small files, all at once."""

    def sync_directory(self) -> None:
        """Make every name written so far durable."""

    def publish(self, name: str, *, replace: bool) -> None:
        """Give the directory its final name, atomically, and make that durable. Raises ``StepExists``."""

    def discard(self) -> None:
        """Remove what was written. Idempotent; never raises."""


class Store(Protocol):
    """Where a run's checkpoints live. Thread-safe; every call may block on the device."""

    def begin(self, step: int, attempt: str) -> Attempt: ...

    def free_bytes(self) -> int: ...

    def names(self) -> list[str]:
        """Candidate checkpoints' names, in no order. Temporary and trash names are not among them."""

    def open(self, name: str) -> Reader: ...

    def remove(self, name: str) -> bool:
        """Rename to trash, then delete. False where a reader holds the checkpoint (nothing is done then)."""

    def set_aside(self, name: str) -> str:
        """Move a damaged checkpoint out of the way without deleting it; the new name."""


class Reader(Protocol):
    """An open checkpoint, protected from retention until closed. Thread-safe."""

    name: str
    path: str

    def files(self) -> dict[str, int]:
        """Regular files and their sizes. Raises ``CheckpointDamaged`` on anything that is no regular file."""

    def read_small(self, file: str, limit_bytes: int) -> bytes: ...

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        """Read into an aligned, padded buffer, past the page cache where the file system can; bytes read."""

    def close(self) -> None: ...


class Digest(Protocol):
    """A digest over one buffer: bytes in, lowercase hex out. Releases the GIL; thread-safe."""

    def __call__(self, data: Buffer, /) -> str: ...
