"""Chunks that are stored as layers: a base, and on it the differences (XOR) of later checkpoints to the one before."""

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

#: Where a checkpoint has the files of others that it builds on.
_FOLDER: Final = "base"


def xor(target: Array, other: Array) -> None:
    """``target ^= other``, with the GIL released."""
    whole = target.nbytes // 8 * 8
    words = target[:whole].view(np.uint64)
    np.bitwise_xor(words, other[:whole].view(np.uint64), out=words)
    np.bitwise_xor(target[whole:], other[whole:], out=target[whole:])


class LayerReader:
    """Reads and decodes single chunks, verified. Thread-safe: each thread has buffers of its own."""

    def __init__(self, reader: Reader, codec: Codec, digest: Digest) -> None:
        self._reader = reader
        self._codec = codec
        self._digest = digest
        self._local = threading.local()

    def add(self, files: Sequence[FileRecord], number: int, out: Array) -> None:
        """XOR chunk ``number`` of each file, decoded, into ``out``. Blocks. Raises ``CheckpointDamaged``."""
        for record in files:
            extent = record.chunk(number)
            where = f"{self._reader.path}/{record.name} [{extent.offset}:{extent.offset + extent.nbytes}]"
            buffer = self._buffer("read", extent.nbytes)
            got = self._reader.read_into(record.name, buffer, extent.nbytes, extent.offset)
            if got != extent.nbytes or self._digest(buffer[: extent.nbytes]) != extent.digest:
                raise CheckpointDamaged(f"{where}: the bytes do not match their digest")
            layer: Array = np.frombuffer(self._buffer("decoded", out.nbytes), np.uint8)[: out.nbytes]
            try:
                self._codec.decode(np.frombuffer(buffer, np.uint8)[: extent.stored], layer)
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
    """``FileRecord.order`` of a file with these extents and, in the layout's order, these chunks."""
    at = {extent.offset: number for number, extent in enumerate(extents)}
    order = tuple(at[chunk.offset] for chunk in chunks)
    return () if order == tuple(range(1, len(order) + 1)) else order


def layer_name(record: FileRecord, reader: Reader) -> str:
    """What a file of an open checkpoint is called in the checkpoints that build on it; a layer keeps its name."""
    return record.name if is_layer(record.name) else f"{_FOLDER}/{reader.name}/{record.name}"


def is_layer(file: str) -> bool:
    """Whether a checkpoint's file is one of an earlier checkpoint, there for others to build on."""
    return file.startswith(f"{_FOLDER}/")
