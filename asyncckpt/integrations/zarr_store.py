"""Any zarr code reads a checkpoint through this read-only store, which hands out no unverified byte.

Opening the directory itself with zarr works too and is unsafe in two ways: nothing is verified, and a chunk that is
missing reads as zeros. Here both are errors.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import NoReturn

from asyncckpt.codecs import digests
from asyncckpt.errors import CheckpointDamaged, InvalidOption, MissingExtra
from asyncckpt.formats.zarr import METADATA_FILE
from asyncckpt.manifest.records import FileRecord
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.read.extents import extents_of
from asyncckpt.read.opening import OpenCheckpoint, open_checkpoint
from asyncckpt.storage import local_path, open_store

try:
    import zarr
    from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

    from asyncckpt.integrations import zarr_dtypes
except ImportError as error:
    raise MissingExtra("reading with zarr needs zarr 3.1 or newer: pip install 'asyncckpt[zarr]'") from error


def open_group(checkpoint: str | os.PathLike[str] | OpenCheckpoint) -> zarr.Group:
    """Open the checkpoint's root group (``group["model"]["blocks.0.weight"][:]``), read-only; every byte is verified as
    it is read.

    ``checkpoint`` is a checkpoint's directory, or what ``Run.open`` returns (which the caller closes). Blocks on the
    disk. The group is thread-safe. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` (later reads do, too), and
    ``InvalidOption`` for a checkpoint of another format.
    """
    zarr_dtypes.register()
    return zarr.open_group(CheckpointStore(checkpoint), mode="r")


class CheckpointStore(Store):
    """Presents a published checkpoint as zarr's ``Store``. Reads block a thread of asyncio's pool. Thread-safe.

    ``checkpoint`` is a checkpoint's directory, or what ``Run.open`` returns (which the caller closes). ``read_only`` is
    for callers that give it to every store: a checkpoint is never changed. Retention spares the checkpoint until
    ``close``, after which every read raises ``InvalidOption``. A pickled store, such as dask and spawned workers get,
    opens the checkpoint there anew, and only where its manifest is still the same one. Raises ``CheckpointNotFound``,
    ``CheckpointDamaged``, and ``InvalidOption`` for a checkpoint of another format.
    """

    def __init__(self, checkpoint: str | os.PathLike[str] | OpenCheckpoint, *, read_only: bool = True) -> None:
        super().__init__(read_only=True)
        if not read_only:
            raise InvalidOption("a checkpoint is never changed: open it with read_only=True (mode='r')")
        self._set_up(checkpoint, None)

    def _set_up(self, checkpoint: str | os.PathLike[str] | OpenCheckpoint, expect_digest: str | None) -> None:
        self._closed = False
        self._owned = isinstance(checkpoint, str | os.PathLike)
        if isinstance(checkpoint, str | os.PathLike):
            parent, name = os.path.split(local_path(checkpoint))
            checkpoint = open_checkpoint(open_store(parent).open(name), expect_digest)
            # workers drop their copies of a store, and do not close them
            weakref.finalize(self, checkpoint.close)
        self._reader, self._manifest = checkpoint.reader, checkpoint.manifest
        if self._manifest.shard_format != "zarr":
            self.close()
            raise InvalidOption(f"{self._reader.path} is a checkpoint of format {self._manifest.shard_format}")
        self._digest = digests.get(self._manifest.digest)
        self._files = {record.name: record for record in self._manifest.files}
        self._arrays = {
            name.rpartition("/")[0]
            for component in self._manifest.components.values()
            for tensor in component.tensors.values()
            for name in tensor.files
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointStore) and other._reader.path == self._reader.path

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CheckpointStore({self._reader.path!r})"

    def __getstate__(self) -> tuple[str, str, bool]:
        return self._reader.path, self._manifest.file_digest, self._is_open

    def __setstate__(self, state: tuple[str, str, bool]) -> None:
        path, file_digest, is_open = state
        super().__init__(read_only=True)
        self._set_up(path, file_digest)
        self._is_open = is_open

    def with_read_only(self, read_only: bool = False) -> Store:
        """Return another store of the same checkpoint. Raises ``NotImplementedError`` for one that can be written."""
        return CheckpointStore(self._reader.path) if read_only else super().with_read_only(read_only)

    def close(self) -> None:
        """Let retention have the checkpoint again, unless the caller opened it. Later reads raise. Idempotent."""
        super().close()
        self._closed = True
        if self._owned:
            self._reader.close()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read and verify a key's bytes; None where there is no such key. Raises ``CheckpointDamaged`` for bytes that
        are not what was saved, and for a chunk that is missing."""
        if self._closed:
            raise InvalidOption(f"{self._reader.path}: this store is closed; open another one")
        if not self._is_open:
            await self._open()
        record = self._files.get(key)
        if record is None:
            if key.rpartition("/")[0] in self._arrays and key.rpartition("/")[2].startswith("c"):
                raise CheckpointDamaged(f"{self._reader.path}/{key}: the manifest has no such chunk")
            return None
        data = await asyncio.to_thread(self._read, record, *_span(byte_range, record.nbytes))
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def getsize(self, key: str) -> int:
        if key not in self._files:
            raise FileNotFoundError(key)
        return self._files[key].nbytes

    async def exists(self, key: str) -> bool:
        return key in self._files

    async def list(self) -> AsyncIterator[str]:
        for name in self._files:
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for name in self._files:
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        for child in dict.fromkeys(
            name[len(folder) :].partition("/")[0] for name in self._files if name.startswith(folder)
        ):
            # what does not belong to the zarr hierarchy (the manifest's own files) has no zarr.json, and is not shown
            if folder or child == METADATA_FILE or f"{child}/{METADATA_FILE}" in self._files:
                yield child

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    async def set(self, key: str, value: Buffer) -> NoReturn:
        self._refuse(key)

    async def delete(self, key: str) -> NoReturn:
        self._refuse(key)

    def _refuse(self, key: str) -> NoReturn:
        raise InvalidOption(
            f"{self._reader.path}/{key}: a checkpoint is never changed, and its store was opened in read-only mode and "
            f"does not support writing; copy what you want to edit"
        )

    def _read(self, record: FileRecord, begin: int, end: int) -> bytes:
        chosen = extents_of(self._manifest, {record.name: [(begin, max(end, begin + 1))]})
        parts: list[bytes] = []
        for _, extent in chosen:
            buffer = memoryview(aligned_buffer(extent.nbytes))
            got = self._reader.read_into(record.name, buffer, extent.nbytes, extent.offset)
            if got != extent.nbytes or self._digest(buffer[: extent.nbytes]) != extent.digest:
                where = f"{self._reader.path}/{record.name} [{extent.offset}:{extent.offset + extent.nbytes}]"
                raise CheckpointDamaged(f"{where}: the bytes do not match their digest")
            parts.append(bytes(buffer[max(0, begin - extent.offset) : max(0, min(end - extent.offset, extent.nbytes))]))
        return b"".join(parts)


def _span(wanted: ByteRequest | None, nbytes: int) -> tuple[int, int]:
    match wanted:
        case None:
            return 0, nbytes
        case RangeByteRequest():
            return min(wanted.start, nbytes), min(wanted.end, nbytes)
        case OffsetByteRequest():
            return min(wanted.offset, nbytes), nbytes
        case SuffixByteRequest():
            return max(0, nbytes - wanted.suffix), nbytes
    raise InvalidOption(f"Unexpected byte_range, got {wanted!r}: give one of zarr's kinds")
