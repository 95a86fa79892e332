"""The hand-over types between the rooms, and the contracts a backend or format has to keep. Nothing here does work."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Protocol, cast, runtime_checkable

from asyncckpt.types import Buffer, Holder, LayoutOptions, LeaseOptions, ShardFile, TensorSpec, WrittenRange


@runtime_checkable
class LiesInFile(Protocol):
    """A module whose tensors lie in one file of a name that another library looks for, with assets beside it."""

    #: The file's name in a checkpoint, with folders before it.
    checkpoint_file: str

    def checkpoint_assets(self) -> Mapping[str, bytes]:
        """Return the files that the library looks for beside the tensors', by name."""
        ...

    def checkpoint_mismatch(self, stored: Mapping[str, Any]) -> str | None:
        """Say why this object cannot take what was stored, given what that held beside tensors; None where it can."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """torch's ``Stateful``: anything that can give and take its state."""

    def state_dict(self) -> Any:
        """Return the state: tensors and plain values in dicts and lists."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over a state that ``state_dict`` has returned."""


class Codec(Protocol):
    """A lossless codec turns the bytes of one chunk into a frame, and a frame into those bytes. Stateless, thread-safe,
    and never holds the GIL for long. ``asyncckpt.testing.contracts.CodecContract`` tests one."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return its options, as they go into the manifest."""

    def encode(self, data: Any, item_bytes: int, out: Any) -> int:
        """Encode a uint8 array of items of ``item_bytes`` into the uint8 array ``out``; return the frame's size, which
        is at most that of the data and ``codecs.blosc.FRAME_OVERHEAD_BYTES``."""

    def encode_if_smaller(self, data: Any, item_bytes: int, out: Any) -> int:
        """Do what ``encode`` does where that pays; return 0 where the data had better lie as it is, in the frame that
        ``codecs.blosc.uncompressed_frame`` makes."""

    def decode(self, frame: Any, out: Any) -> None:
        """Decode a whole frame into exactly ``out``. Raises ``CheckpointDamaged``, before anything over ``out``'s
        size is produced."""

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        """Return the zarr v3 bytes-to-bytes codecs that read these frames."""


class ShardFormat(Protocol):
    """A format says what the bytes of a shard are. Stateless and thread-safe."""

    name: str

    def shards(
        self,
        component: str,
        specs: Sequence[TensorSpec],
        first_piece: int,
        first_shard: int,
        codec: Codec,
        options: LayoutOptions,
    ) -> list[ShardFile]:
        """Divide one component into shards, numbered from ``first_shard``; ``specs[i]`` describes piece
        ``first_piece + i``. Pure: equal arguments give equal shards on every rank."""

    def seal(self, shard: ShardFile, placed: Sequence[WrittenRange], codec: Codec) -> tuple[bytes, bytes]:
        """Return the head (into ``header_bytes``) and the tail of a shard that is packed on write whose extents are
        ``placed``."""

    def small_files(self, component: str, shards: Sequence[ShardFile], codec: Codec) -> dict[str, bytes]:
        """Return what readers of the format look for beside the shards of a component, by name: metadata."""

    def root_files(self, indexed: Sequence[ShardFile], assets: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return what readers of the format look for once in a checkpoint, by name. ``indexed``: the shards of the one
        component that an index may list, empty where there is none. ``assets``: what lies beside it."""


class ShardWriter(Protocol):
    """One shard file being written. ``write_at`` is thread-safe and blocks; an error in any call is final."""

    def write_at(self, view: memoryview, nbytes: int, offset: int) -> None:
        """Write ``nbytes`` of ``view`` at ``offset``; the view begins as far into a block of ``ALIGNMENT_BYTES`` of
        memory as the offset into one of the file, and is padded to the end of its last block."""

    def finish(self, nbytes: int) -> None:
        """Cut the file to ``nbytes``, make it durable and close it."""

    def abort(self) -> None:
        """Close the file without making it durable. Idempotent; never raises."""


class PendingDirectory(Protocol):
    """One unpublished checkpoint, which no reader takes for one. Its uuid is never used again. The order of calls is
    that of ``commit.publication``: files, ``sync_directory``, the manifest, ``sync_directory``, ``publish``."""

    uuid: str
    #: Where it is written to, for messages.
    path: str

    def create_shard(self, file: str, nbytes: int, *, shared: bool = False) -> ShardWriter:
        """Create a new file of at most ``nbytes``, with the directories in its name. ``shared``, where the store has
        ``Capability.SHARED_FILES``: other ranks write into it too, so it may be there already, and no byte but those
        asked for is touched."""

    def link(self, source: Reader, file: str, nbytes: int, name: str) -> bool:
        """Take over another checkpoint's file of that size as ``name``, without copying it; return False where the
        storage cannot. Raises ``CheckpointDamaged`` where the file is not what it was."""

    def write_small(self, files: Mapping[str, bytes]) -> None:
        """Create small files and make their content durable, all at once. Blocks on the device."""

    def sync_directory(self) -> None:
        """Make every name written so far durable."""

    def open(self) -> Reader:
        """Open what has been written, for reading it back."""

    def publish(self, name: str, *, replace: bool) -> None:
        """Make this the checkpoint of that name, atomically and durably: a reader sees nothing of it before, and all of
        it after. ``replace``, where the store has ``Capability.RENAMES``: also where there is one of that name, which
        stays until then. Raises ``StepExists``."""

    def close(self) -> None:
        """Write nothing more; what is there stays. Idempotent; never raises."""

    def discard(self) -> None:
        """Remove what was written, unless it was published. Idempotent; never raises."""


class Capability(enum.Enum):
    """What a storage backend can do beyond what every backend has to: beyond a bucket of objects."""

    #: Names move in one step: a checkpoint can be replaced, hidden, set aside. See ``RenamingStore``.
    RENAMES = "renames"
    #: A file can be taken over into another checkpoint without being copied.
    LINKS = "links"
    #: Several ranks can write into one file.
    SHARED_FILES = "shared files"
    #: The system releases what a dead process held, and a reader keeps a checkpoint from being deleted.
    LOCKS = "locks"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a listing says of one entry. ``nbytes``: the size of a file; 0 for anything else."""

    nbytes: int
    kind: Literal["file", "folder", "other"]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A checkpoint that lies under a hidden name: the save with the uuid ``attempt`` takes the place of ``name``."""

    hidden: str
    name: str
    attempt: str


class Hold(Protocol):
    """A run that is held by one writer. Thread-safe."""

    #: A name that no other writer of the run ever had or gets.
    owner: str

    def check(self) -> None:
        """Raise ``LeaseLost`` where another writer has taken the run over, and ``OSError`` where that cannot be told.
        Called right before a publish."""

    def release(self) -> None:
        """Give the run back. Idempotent; never raises, and blocks for seconds at most where the storage hangs."""


class Store(Protocol):
    """Where one run's checkpoints live. Thread-safe; every call may block on the device.

    It asks no more than a bucket of objects can keep: objects that appear whole, small ones that are only created where
    there is none, reads of a range, listing, deletion. What a backend can do beyond that it names in ``capabilities``.
    ``asyncckpt.testing.contracts.StoreContract`` tests one.
    """

    #: The run, in words that ``open_store`` takes; for a local directory, its absolute path.
    address: str

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this backend can do beyond what every one has to. It may shrink while the store is used, where the
        storage turns out to lack something, and never grows."""

    def prepare(self, *, create_parents: bool = False) -> None:
        """Make the run usable for writing. Raises ``RunPathError`` with the way out."""

    def hold(self, *, takeover: bool = False, options: LeaseOptions | None = None) -> Hold:
        """Become the run's only writer. Blocks for at most ``options.ttl_seconds`` and the device. Raises ``RunLocked``
        while another live run holds it. ``takeover``: cut such a one off."""

    def holder(self) -> Holder | None:
        """Return the recorded holder, or None where there is no record that can be read (it is a record, no lock)."""

    def reclaim(self) -> list[str]:
        """Delete what dead attempts and interrupted deletions left behind; return the names. Only for whoever holds
        the run. Raises ``RunPathError``."""

    def free_bytes(self) -> int | None:
        """Return how much can still be written; None where there is no such limit."""

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Store a small object beside the checkpoints: a pin such as ``.pins/step-1``, or the hint ``latest``. Readers
        see all of it or nothing. Raises ``FileExistsError`` where there is one, unless ``replace``; such a one need not
        be durable, because a hint is never truth."""

    def delete(self, key: str) -> None:
        """Delete a small object. Does nothing where there is none."""

    def names(self) -> list[str]:
        """Return the candidate checkpoints' names, in no order. Hidden names, which begin with a dot, are not among
        them."""

    def identity(self, name: str) -> int | None:
        """Return a number for what is there under this name, of whatever kind: another where it was replaced, None
        where nothing is."""

    def listing(self, name: str) -> Mapping[str, FileInfo]:
        """Return the entries of a checkpoint, of a folder such as ``.pins``, or, for an empty name, of the run; links
        are not followed. Empty where there is nothing of that name."""

    def begin(self, step: int, attempt: str, *, name: str, shared: bool = False) -> PendingDirectory:
        """Begin an attempt to publish ``name``. ``attempt``: its uuid. ``shared``: another rank may have begun this
        very attempt already. Raises ``StepExists`` where this store could not publish that name: without
        ``Capability.RENAMES``, where it is taken."""

    def open(self, name: str) -> Reader:
        """Open a checkpoint. Raises ``CheckpointNotFound`` and ``CheckpointDamaged``."""

    def remove(self, name: str) -> bool:
        """Delete a checkpoint such that no moment shows half of it as a whole one. Returns False where a reader holds
        it (nothing is done then). Raises ``FileNotFoundError``."""


class RenamingStore(Store, Protocol):
    """A store with ``Capability.RENAMES``. Each of these is atomic, and durable on return."""

    def set_aside(self, name: str) -> str:
        """Move a damaged checkpoint out of the way without deleting it; return its new name."""

    def make_way(self, name: str, attempt: str) -> Replaced | None:
        """Hide a checkpoint that the save with that attempt uuid takes the place of; return None where there is none of
        that name."""

    def put_back(self, replaced: Replaced) -> bool:
        """Give a hidden checkpoint its name back; return False where that failed, which is logged."""

    def empty_trash(self) -> None:
        """Delete the checkpoints whose place others have taken (``publish`` with ``replace``), except those that are
        still being read. Blocks; never raises."""

    def replaced(self) -> list[Replaced]:
        """Return the checkpoints that are hidden."""


def renaming(store: Store) -> RenamingStore | None:
    """Return the store as one whose names move, or None where they do not."""
    return cast(RenamingStore, store) if Capability.RENAMES in store.capabilities else None


#: In ``Reader.files``, the size of what is no regular file.
NOT_REGULAR: Final = -1


class Reader(Protocol):
    """An open checkpoint. Thread-safe. Where the store has ``Capability.LOCKS``, retention does not delete it before
    ``close``."""

    name: str
    #: Where it is, for messages.
    path: str

    def files(self) -> dict[str, int]:
        """Return everything that lies in the checkpoint: regular files with their sizes in bytes, and what is neither
        that nor a directory on the way to one, such as a link, with ``NOT_REGULAR``."""

    def files_nbytes(self, file: str) -> int:
        """Return one file's size. Raises ``CheckpointDamaged`` where it is missing or no regular file."""

    def read_small(self, file: str, limit_bytes: int) -> bytes:
        """Return a whole file. Raises ``CheckpointDamaged`` where it is missing or larger than the limit."""

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        """Read into an aligned, padded buffer, past the page cache where the file system can; return how many bytes
        were read, fewer than ``nbytes`` only at the file's end."""

    def close(self) -> None:
        """Let go of the checkpoint. Idempotent; never raises."""

    def disarm(self) -> None:
        """In a forked child, let go of what it has inherited, and take nothing from its parent."""


class SpaceReserver(Protocol):
    """A space reserver can make room on the storage, and knows what else is about to be written to it."""

    def make_room(self, nbytes: int, step: int) -> None:
        """Make sure that a save of so many bytes fits, by retention where need be. Blocks on the device. Raises
        ``NotEnoughSpace``."""


class Digest(Protocol):
    """A digest function takes buffers, one after the other, and returns lowercase hex. It releases the GIL and is
    thread-safe."""

    def __call__(self, *parts: Buffer) -> str: ...
