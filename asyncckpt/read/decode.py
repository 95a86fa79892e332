"""Decodes chunks of stored tensors into the tensors that take their values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from asyncckpt.codecs import blosc, codecs, digests
from asyncckpt.codecs.dtypes import ITEM_BYTES, NAMES, PLANE_BYTES
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.manifest.records import ChunkedRecord, ExtentRecord, FileRecord, Manifest, StoredTensor
from asyncckpt.memory.buffers import aligned_buffer, padded
from asyncckpt.memory.tensor_bytes import is_plain
from asyncckpt.protocols import Codec, Digest, Reader
from asyncckpt.read.boxes import Target, TargetBox, overlap_range, scatter_box
from asyncckpt.read.delta import DeltaReader
from asyncckpt.read.scatter import Window, scatter
from asyncckpt.types import Buffer, ContentDigest

if TYPE_CHECKING:
    import torch


class Decoder:
    """Decodes chunks into targets. Thread-safe: each reader thread has a buffer of its own."""

    def __init__(self, reader: Reader, manifest: Manifest) -> None:
        self._codec: Codec = codecs.get(manifest.codec, manifest.codec_options)
        self._digest: Digest = digests.get(manifest.digest)
        self._bases = DeltaReader(reader, self._codec, self._digest)
        self._local = threading.local()

    def decode_into(
        self,
        tensor: ChunkedRecord,
        chunk: int,
        extent: ExtentRecord,
        base_chunks: tuple[Sequence[FileRecord], int],
        targets: Sequence[Target],
        begun: Callable[[], None],
        view: memoryview,
    ) -> None:
        """Decode a tensor's chunk number ``chunk``, whose extent's bytes are in ``view``, and copy it into the targets.
        ``base_chunks``: the files that the chunk is a difference to, and the chunk's number in them. ``begun``: called
        before a target changes. Raises ``CheckpointDamaged`` where the chunk does not decode to what was encoded."""
        begin, nbytes = tensor.span(chunk)
        decoded = tensor.chunk_bytes if tensor.padded else nbytes
        dtype = dtype_of(tensor)
        if extent.content is None:
            data = as_tensor(view)[:nbytes]
        else:
            low, high = byte_range(tensor, targets[0])
            whole = len(targets) == 1 and decoded == nbytes and low <= begin and begin + nbytes <= high
            direct = whole and isinstance(targets[0], Window) and _takes_bytes(targets[0].tensor, dtype)
            if direct:
                begun()
                flat = targets[0].tensor.detach().reshape(-1).view(loaded_torch().uint8)
                out = flat[begin - low : begin - low + nbytes]
            else:
                out = self._buffer(decoded)
            self._codec.decode(np.frombuffer(view, np.uint8)[: extent.payload_bytes], out.numpy())
            self._bases.add(*base_chunks, out.numpy())
            if not self._is_what_was_saved(out.numpy(), PLANE_BYTES[tensor.dtype], extent.content):
                raise CheckpointDamaged("the chunk decodes to other bytes than were saved")
            if direct:
                return
            data = out[:nbytes]
        begun()
        for target in targets:
            if isinstance(target, TargetBox):
                offsets = [0] * len(tensor.shape)
                scatter_box(target, offsets, tensor.shape, begin // dtype.itemsize, data, dtype)
                continue
            low, high = byte_range(tensor, target)
            first, last = max(begin, low), min(begin + nbytes, high)
            scatter(target.tensor, first - low, data[first - begin : last - begin], dtype)

    def _is_what_was_saved(self, data: blosc.Array, item_bytes: int, expected: ContentDigest) -> bool:
        """Whether decoded data has this content digest. The first code with codecs recorded the digest of the data
        itself instead; its checkpoints stay readable."""
        if self._content(data, item_bytes, expected.split) == expected.hex:
            return True
        return not expected.split and self._digest(data.data) == expected.hex

    def _content(self, data: blosc.Array, item_bytes: int, split: bool) -> str:
        """Digest the image that the decoded data was staged as (docs/format.md). ``split``: as planes."""
        if split:
            places = blosc.split_places(data.nbytes, item_bytes)
            image = np.zeros(padded(places[-1] + data.nbytes // item_bytes), np.uint8)
            for plane, place in enumerate(places):
                np.copyto(image[place : place + data.nbytes // item_bytes], data.reshape(-1, item_bytes)[:, plane])
            blosc.split_frame(image, data.nbytes, item_bytes)
            return self._digest(image.data)
        header = np.empty(blosc.BLOSC_HEADER_BYTES, np.uint8)
        blosc.uncompressed_frame(header, data.nbytes, item_bytes)
        return self._digest(
            header.data, data.data, bytes(padded(len(header) + data.nbytes) - len(header) - data.nbytes)
        )

    def _buffer(self, nbytes: int) -> torch.Tensor:
        kept: torch.Tensor | None = getattr(self._local, "buffer", None)
        if kept is None or kept.numel() < nbytes:
            kept = self._local.buffer = as_tensor(aligned_buffer(nbytes))
        return kept[:nbytes]


def as_tensor(memory: Buffer) -> torch.Tensor:
    """Return the bytes of the memory as a tensor that shares it."""
    there = loaded_torch()
    data: torch.Tensor = there.frombuffer(memory, dtype=there.uint8)
    return data


def dtype_of(tensor: StoredTensor) -> torch.dtype:
    """Return the dtype of a stored tensor's elements."""
    dtype: torch.dtype = getattr(loaded_torch(), NAMES[tensor.dtype])
    return dtype


def _takes_bytes(target: torch.Tensor, dtype: torch.dtype) -> bool:
    return target.dtype == dtype and target.device.type == "cpu" and is_plain(target)


def byte_range(tensor: StoredTensor, target: Target) -> tuple[int, int]:
    """Return the range of a stored tensor's bytes from the first to the last that a target takes."""
    item = ITEM_BYTES[tensor.dtype]
    if isinstance(target, TargetBox):
        first, last = overlap_range([0] * len(tensor.shape), tensor.shape, target)
        return first * item, last * item
    return target.first * item, (target.first + target.tensor.numel()) * item
