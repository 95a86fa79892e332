"""A chunk may be stored as a chain of differences: a base, and for each later checkpoint the XOR to the one before.

The files of earlier checkpoints that a checkpoint builds on are linked into its own directory, so it stands alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np

from asyncckpt.codecs.blosc import Array
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import ExtentRecord, FileRecord, WrittenExtent
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Codec, Digest, Reader

#: A checkpoint has the files of earlier ones that it builds on in this directory.
_FOLDER: Final = "base"


def xor(target: Array, other: Array) -> None:
    """Compute ``target ^= other`` in place, with the GIL released."""
    whole = target.nbytes // 8 * 8
    words = target[:whole].view(np.uint64)
    np.bitwise_xor(words, other[:whole].view(np.uint64), out=words)
    np.bitwise_xor(target[whole:], other[whole:], out=target[whole:])


class DeltaReader:
    """Reads, verifies and decodes single chunks of a delta chain. Thread-safe: each thread has buffers of its own."""

    def __init__(self, reader: Reader, codec: Codec, digest: Digest) -> None:
        self._reader = reader
        self._codec = codec
        self._digest = digest
        self._local = threading.local()

    def add(self, files: Sequence[FileRecord], number: int, out: Array) -> None:
        """Decode chunk ``number`` of each file and XOR it into ``out``. Blocks. Raises ``CheckpointDamaged``."""
        for record in files:
            extent = record.chunk(number)
            where = f"{self._reader.path}/{record.name} [{extent.offset}:{extent.offset + extent.nbytes}]"
            buffer = self._buffer("read", extent.nbytes)
            got = self._reader.read_into(record.name, buffer, extent.nbytes, extent.offset)
            if got != extent.nbytes or self._digest(buffer[: extent.nbytes]) != extent.digest:
                raise CheckpointDamaged(f"{where}: the bytes do not match their digest")
            layer: Array = np.frombuffer(self._buffer("decoded", out.nbytes), np.uint8)[: out.nbytes]
            try:
                self._codec.decode(np.frombuffer(buffer, np.uint8)[: extent.payload_bytes], layer)
            except CheckpointDamaged as error:
                raise CheckpointDamaged(f"{where}: {error}") from error
            xor(out, layer)

    def _buffer(self, name: str, nbytes: int) -> memoryview:
        kept: memoryview | None = getattr(self._local, name, None)
        if kept is None or kept.nbytes < nbytes:
            kept = memoryview(aligned_buffer(nbytes))
            setattr(self._local, name, kept)
        return kept


def order_of(extents: Sequence[ExtentRecord], chunks: Sequence[WrittenExtent]) -> tuple[int, ...]:
    """Return ``FileRecord.order`` of a file that has these extents and, in the layout's order, these chunks."""
    at = {extent.offset: number for number, extent in enumerate(extents)}
    order = tuple(at[chunk.offset] for chunk in chunks)
    return () if order == tuple(range(1, len(order) + 1)) else order


def layer_name(record: FileRecord, reader: Reader) -> str:
    """Return the name that a file of an open checkpoint has in the checkpoints that build on it. A file that is itself
    one of an earlier checkpoint keeps its name."""
    return record.name if is_layer(record.name) else f"{_FOLDER}/{reader.name}/{record.name}"


def is_layer(file: str) -> bool:
    """Whether this file of a checkpoint comes from an earlier one, and is there because others build on it."""
    return file.startswith(f"{_FOLDER}/")
