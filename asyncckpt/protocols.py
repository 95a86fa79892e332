"""The hand-over types between the rooms, and the contracts a backend or format has to keep. Nothing here does work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from asyncckpt.types import Buffer, LayoutOptions, Placed, Shard, TensorSpec


@runtime_checkable
class Stateful(Protocol):
    """torch's ``Stateful``: anything that can give and take its state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


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

    path: str

    def prepare(self, *, create_parents: bool = False) -> None:
        """Make the run directory usable for writing. Raises ``RunPathError`` with the way out."""

    def reclaim(self) -> list[str]:
        """Delete what dead attempts and interrupted deletions left behind; the names. Only for whoever holds the run's
        lease. Raises ``RunPathError``."""

    def write_hint(self, name: str, text: str) -> None:
        """Replace a small hint file such as ``latest``. Atomic, and not durable: a hint is never truth."""

    def open_attempt(self, path: str) -> Reader:
        """Read an unpublished attempt of this process, for reading back what was written."""

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

    def disarm(self) -> None:
        """In a forked child: let go of what it has inherited, and take nothing from its parent."""


class SpaceReserver(Protocol):
    """Whoever can make room on the storage, and knows what else is about to be written to it."""

    def make_room(self, nbytes: int, step: int) -> None:
        """See that a save of so many bytes fits, by retention where need be. Blocks on the device. Raises
        ``NotEnoughSpace``."""


class Digest(Protocol):
    """A digest over buffers, one after the other: bytes in, lowercase hex out. Releases the GIL; thread-safe."""

    def __call__(self, *parts: Buffer) -> str: ...
