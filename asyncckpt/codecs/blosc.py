"""What an encoded chunk's bytes are: Blosc 1 frames and zstd frames, made and taken apart.

Whatever a frame says of sizes is checked before a decoder that trusts it sees it. Coders belong to a thread.
"""

from __future__ import annotations

import functools
import struct
import threading
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import zstandard

from asyncckpt.errors import CheckpointDamaged

if TYPE_CHECKING:
    import numpy.typing as npt

#: What a frame may add to its data: Blosc's header, block start and one length a plane, or zstd's headers.
FRAME_OVERHEAD_BYTES: Final = 512
#: The Blosc 1 frame header: format version, inner codec's version, flags, typesize, nbytes, blocksize, cbytes.
#: Source: c-blosc's README_CHUNK_FORMAT.
_BLOSC_HEADER = struct.Struct("<BBBBIII")
BLOSC_HEADER_BYTES: Final = _BLOSC_HEADER.size
_BLOSC_FORMAT: Final = 2
_SHUFFLED: Final = 0x1
_COPIED: Final = 0x2
_ZSTD_INSIDE: Final = 4 << 5
_ZSTD_VERSION: Final = 1
Array: TypeAlias = "npt.NDArray[np.uint8]"


@functools.cache
def blosc() -> Any:
    """The module of numcodecs, imported with the first frame: who only lists checkpoints does not wait for it."""
    from numcodecs import blosc as module

    return module


def stored_frame(header: Array, nbytes: int, item_bytes: int) -> int:
    """Make what follows ``header`` (16 bytes, then ``nbytes`` of data) a Blosc frame as it lies; the frame's size."""
    total = nbytes + BLOSC_HEADER_BYTES
    flags = _SHUFFLED | _COPIED | _ZSTD_INSIDE
    put(header, 0, _BLOSC_HEADER.pack(_BLOSC_FORMAT, _ZSTD_VERSION, flags, item_bytes, nbytes, nbytes, total))
    return total


def split_places(nbytes: int, item_bytes: int) -> list[int]:
    """Where each plane of a chunk lies in a Blosc frame that holds it split and otherwise as it is."""
    count = nbytes // item_bytes
    return [BLOSC_HEADER_BYTES + 4 + 4 + plane * (4 + count) for plane in range(item_bytes)]


def split_frame(image: Array, nbytes: int, item_bytes: int) -> int:
    """Make an image whose planes lie at ``split_places`` such a frame; the frame's size."""
    count = nbytes // item_bytes
    for place in split_places(nbytes, item_bytes):
        put_length(image, place - 4, count)
    total = split_places(nbytes, item_bytes)[-1] + count
    put_header(image, item_bytes, nbytes, total)
    return total


def put_header(out: Array, item_bytes: int, nbytes: int, total: int) -> None:
    """Of a frame of one split block."""
    flags = _SHUFFLED | _ZSTD_INSIDE
    put(out, 0, _BLOSC_HEADER.pack(_BLOSC_FORMAT, _ZSTD_VERSION, flags, item_bytes, nbytes, nbytes, total))
    put_length(out, BLOSC_HEADER_BYTES, BLOSC_HEADER_BYTES + 4)


def put(out: Array, position: int, data: bytes) -> int:
    end = position + len(data)
    if end > out.nbytes:
        raise ValueError(f"a frame of {end} bytes does not fit into {out.nbytes}")
    out[position:end] = np.frombuffer(data, np.uint8)
    return end


def put_length(out: Array, position: int, length: int) -> int:
    return put(out, position, length.to_bytes(4, "little"))


def as_view(array: Array) -> memoryview:
    return array.data


def zstd_into(frame: Array, out: Array) -> None:
    if _coders.decompressor is None:
        _coders.decompressor = zstandard.ZstdDecompressor()
    try:
        parameters = zstandard.get_frame_parameters(as_view(frame))
        if parameters.content_size != out.nbytes:
            raise wrong_size(parameters.content_size, out.nbytes)
        data = _coders.decompressor.decompress(as_view(frame), max_output_size=out.nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointDamaged(f"a zstd frame cannot be decoded: {error}") from error
    if len(data) != out.nbytes:
        raise wrong_size(len(data), out.nbytes)
    put(out, 0, data)


def blosc_into(frame: Array, out: Array) -> None:
    """Everything the frame says of sizes is checked first: the decoder trusts its header."""
    if frame.nbytes < BLOSC_HEADER_BYTES:
        raise CheckpointDamaged(f"a Blosc frame of {frame.nbytes} bytes is shorter than its header")
    version, _, _, _, nbytes, blocksize, total = _BLOSC_HEADER.unpack_from(as_view(frame))
    if version != _BLOSC_FORMAT or total != frame.nbytes:
        raise CheckpointDamaged(f"a Blosc frame of version {version} says {total} bytes and has {frame.nbytes}")
    if nbytes != out.nbytes or blocksize > max(nbytes, 1 << 20):
        raise wrong_size(nbytes, out.nbytes)
    if not nbytes:
        return
    try:
        blosc().decompress(frame, out)
    except (RuntimeError, ValueError) as error:
        raise CheckpointDamaged(f"a Blosc frame cannot be decoded: {error}") from error


def wrong_size(found: int, expected: int) -> CheckpointDamaged:
    return CheckpointDamaged(f"a frame decodes to {found} bytes, not to {expected}")


class _Coders(threading.local):
    """Compressors and scratch memory of one thread: neither may be shared, and making them anew costs page faults."""

    def __init__(self) -> None:
        self.by_level: dict[int, zstandard.ZstdCompressor] = {}
        self.literals: zstandard.ZstdCompressor | None = None
        self.decompressor: zstandard.ZstdDecompressor | None = None
        self.scratch: Array = np.empty(0, np.uint8)


_coders = _Coders()


def compressor(level: int) -> zstandard.ZstdCompressor:
    found = _coders.by_level.get(level)
    if found is None:
        found = _coders.by_level[level] = zstandard.ZstdCompressor(level=level)
    return found


def literals() -> zstandard.ZstdCompressor:
    """zstd reduced to its Huffman coder: 64 hash entries and long matches find next to nothing in noise, and skip it.

    Exponents are noise of few symbols; matches in it cost more bits and time than they save: 2.7 times the speed of
    level 1 at a better ratio.
    """
    if _coders.literals is None:
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=17,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            write_content_size=True,
        )
        _coders.literals = zstandard.ZstdCompressor(compression_params=parameters)
    return _coders.literals


def scratch(nbytes: int) -> Array:
    if _coders.scratch.nbytes < nbytes:
        _coders.scratch = np.empty(nbytes, np.uint8)
    return _coders.scratch[:nbytes]
