"""Codecs: bytes of one chunk ↔ a frame. Frozen dataclasses and a table by name; the name goes into the manifest.

Every frame is one that zarr's own codecs read: a Blosc 1 frame or a zstd frame, so nothing of this library is needed to
decode a checkpoint. All hot calls release the GIL.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard
from numcodecs import blosc

from asyncckpt.errors import CheckpointDamaged, InvalidOption, UnknownName
from asyncckpt.protocols import Codec

#: Begins the content digest of a chunk whose staged image was split into planes: the same data has another image then.
SPLIT_MARK: Final = "planes:"
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
#: Decoders before c-blosc 1.21 take a block for split only where a plane has this many bytes.
_MIN_PLANE_BYTES: Final = 128
#: Below this a chunk is stored as it is: a file system block is 4 KiB, and the calls would cost more than the bytes.
MIN_PLANES_CHUNK_BYTES: Final = 16 << 10
#: Far below what Blosc itself takes; a decoder needs three times as much memory.
_MAX_BLOCK_BYTES: Final = 64 << 20
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 8 << 10
#: A plane is compressed where its sample shrinks at least this much.
_PAYS: Final = 0.97

Array: TypeAlias = "npt.NDArray[np.uint8]"
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
_SHUFFLES: Final[Mapping[str, int]] = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """``none``: the bytes as they are."""

    name: ClassVar[str] = "none"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        out[: data.nbytes] = data
        return data.nbytes

    attempt = encode

    def decode(self, frame: Array, out: Array) -> None:
        if frame.nbytes != out.nbytes:
            raise _wrong_size(frame.nbytes, out.nbytes)
        out[:] = frame

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Zstd:
    """``zstd``: plain zstd frames at ``level`` (-7 to 22)."""

    name: ClassVar[str] = "zstd"
    level: int = 1

    def __post_init__(self) -> None:
        if type(self.level) is not int or not -7 <= self.level <= 22:
            raise InvalidOption(f"Zstd: level must be a whole number from -7 to 22, not {self.level!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return _put(out, 0, _compressor(self.level).compress(_view(data)))

    attempt = encode

    def decode(self, frame: Array, out: Array) -> None:
        _zstd_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return [{"name": "zstd", "configuration": {"level": self.level, "checksum": False}}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blosc:
    """``blosc``: numcodecs' Blosc. ``cname`` is one of lz4, lz4hc, zlib, zstd, blosclz; ``clevel`` 1 to 9;
    ``blocksize`` in bytes, 0 to let Blosc choose."""

    name: ClassVar[str] = "blosc"
    cname: str = "zstd"
    clevel: int = 1
    shuffle: Shuffle = "bitshuffle"
    blocksize: int = 0

    def __post_init__(self) -> None:
        if self.cname not in ("lz4", "lz4hc", "zlib", "zstd", "blosclz"):
            raise InvalidOption(f"Blosc: unknown cname {self.cname!r}")
        if self.shuffle not in _SHUFFLES:
            raise InvalidOption(f"Blosc: shuffle must be one of {', '.join(_SHUFFLES)}, not {self.shuffle!r}")
        if type(self.clevel) is not int or not 1 <= self.clevel <= 9:
            raise InvalidOption(f"Blosc: clevel must be a whole number from 1 to 9, not {self.clevel!r}")
        if type(self.blocksize) is not int or not 0 <= self.blocksize <= _MAX_BLOCK_BYTES:
            raise InvalidOption(f"Blosc: blocksize must be from 0 to {_MAX_BLOCK_BYTES} bytes, not {self.blocksize!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        if not data.nbytes:
            return _copied(data, item_bytes, out)
        shuffle = _SHUFFLES[self.shuffle]
        frame = blosc.compress(data, self.cname.encode(), self.clevel, shuffle, self.blocksize, item_bytes)
        return _put(out, 0, frame)

    attempt = encode

    def decode(self, frame: Array, out: Array) -> None:
        _blosc_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return [_blosc_json(self.cname, self.clevel, self.shuffle, item_bytes, self.blocksize)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lz4:
    """``lz4``: LZ4 over transposed bits, in Blosc frames: the fastest one, for data that is not noise."""

    name: ClassVar[str] = "lz4"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return _LZ4.encode(data, item_bytes, out)

    attempt = encode

    def decode(self, frame: Array, out: Array) -> None:
        _blosc_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return _LZ4.zarr(item_bytes)


_LZ4 = Blosc(cname="lz4", clevel=1, shuffle="bitshuffle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """``planes``: made for floats. The bytes are split into planes (all first bytes, all second bytes, …); planes whose
    sample shrinks are entropy-coded, the others (mantissas are noise) stored as they are.

    The frame is a Blosc frame of one shuffled, split block, so every Blosc decoder reads it. The entropy coder is zstd
    with matches all but turned off (docs/design/005-codecs.md).
    """

    name: ClassVar[str] = "planes"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return self.attempt(data, item_bytes, out) or _copied(data, item_bytes, out)

    def attempt(self, data: Array, item_bytes: int, out: Array) -> int:
        count = data.nbytes // item_bytes
        if data.nbytes < MIN_PLANES_CHUNK_BYTES or count * item_bytes != data.nbytes or count < _MIN_PLANE_BYTES:
            return 0
        items = data.reshape(count, item_bytes)
        return self.attempt_split([items[:, plane] for plane in range(item_bytes)], out)

    def attempt_split(self, planes: Sequence[Array], out: Array) -> int:
        """As ``attempt``, for data that is split into its planes already."""
        item_bytes, count = len(planes), len(planes[0])
        paying = [number for number, plane in enumerate(planes) if _pays(plane)]
        if not paying:
            return 0
        position = BLOSC_HEADER_BYTES + 4  # the start of the one block follows the header
        for number, plane in enumerate(planes):
            if number in paying:
                packed = _literals().compress(_view(_contiguous(plane)))
                if len(packed) < count:
                    position = _put_length(out, position, len(packed))
                    position = _put(out, position, packed)
                    continue
            position = _put_length(out, position, count)
            np.copyto(out[position : position + count], plane)
            position += count
        if position >= count * item_bytes + BLOSC_HEADER_BYTES:
            return 0
        _put_header(out, item_bytes, count * item_bytes, position)
        return position

    def decode(self, frame: Array, out: Array) -> None:
        _blosc_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return [_blosc_json("zstd", 1, "shuffle", item_bytes, 0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Auto:
    """``auto``: ``planes``, where it does not make saves slower: each chunk is compressed only while the codec is
    faster than the disk, as measured in this run. The frames are those of ``planes``."""

    name: ClassVar[str] = "auto"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return _PLANES.encode(data, item_bytes, out)

    def attempt(self, data: Array, item_bytes: int, out: Array) -> int:
        return _PLANES.attempt(data, item_bytes, out)

    def attempt_split(self, planes: Sequence[Array], out: Array) -> int:
        return _PLANES.attempt_split(planes, out)

    def decode(self, frame: Array, out: Array) -> None:
        _blosc_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return _PLANES.zarr(item_bytes)


_PLANES = Planes()
_TABLE: Final[Mapping[str, Callable[..., Codec]]] = {
    "none": Raw,
    "lz4": Lz4,
    "zstd": Zstd,
    "blosc": Blosc,
    "planes": Planes,
    "auto": Auto,
}


def get(codec: str | Codec, configuration: Mapping[str, Any] | None = None) -> Codec:
    """The codec of that name (or the codec itself). Raises ``UnknownName`` and ``InvalidOption``."""
    if not isinstance(codec, str):
        return codec
    make = _TABLE.get(codec)
    if make is None:
        raise UnknownName(f"unknown codec {codec!r}; known are {', '.join(_TABLE)}")
    try:
        return make(**(configuration or {}))
    except TypeError as error:
        raise InvalidOption(f"codec {codec!r} has no such option: {error}") from error


def names() -> tuple[str, ...]:
    """The names of all codecs."""
    return tuple(_TABLE)


def stored_frame(header: Array, nbytes: int, item_bytes: int) -> int:
    """Make what follows ``header`` (16 bytes, then ``nbytes`` of data) a Blosc frame as it lies; the frame's size."""
    total = nbytes + BLOSC_HEADER_BYTES
    flags = _SHUFFLED | _COPIED | _ZSTD_INSIDE
    _put(header, 0, _BLOSC_HEADER.pack(_BLOSC_FORMAT, _ZSTD_VERSION, flags, item_bytes, nbytes, nbytes, total))
    return total


def split_places(nbytes: int, item_bytes: int) -> list[int]:
    """Where each plane of a chunk lies in a Blosc frame that holds it split and otherwise as it is."""
    count = nbytes // item_bytes
    return [BLOSC_HEADER_BYTES + 4 + 4 + plane * (4 + count) for plane in range(item_bytes)]


def split_frame(image: Array, nbytes: int, item_bytes: int) -> int:
    """Make an image whose planes lie at ``split_places`` such a frame; the frame's size."""
    count = nbytes // item_bytes
    for place in split_places(nbytes, item_bytes):
        _put_length(image, place - 4, count)
    total = split_places(nbytes, item_bytes)[-1] + count
    _put_header(image, item_bytes, nbytes, total)
    return total


def _put_header(out: Array, item_bytes: int, nbytes: int, total: int) -> None:
    """Of a frame of one split block."""
    flags = _SHUFFLED | _ZSTD_INSIDE
    _put(out, 0, _BLOSC_HEADER.pack(_BLOSC_FORMAT, _ZSTD_VERSION, flags, item_bytes, nbytes, nbytes, total))
    _put_length(out, BLOSC_HEADER_BYTES, BLOSC_HEADER_BYTES + 4)


def _contiguous(plane: Array) -> Array:
    if plane.flags.c_contiguous:
        return plane
    scratch = _scratch(len(plane))
    np.copyto(scratch, plane)
    return scratch


def _copied(data: Array, item_bytes: int, out: Array) -> int:
    out[BLOSC_HEADER_BYTES : BLOSC_HEADER_BYTES + data.nbytes] = data
    return stored_frame(out, data.nbytes, item_bytes)


def _pays(plane: Array) -> bool:
    piece = min(_SAMPLE_BYTES, len(plane) // _SAMPLES)
    starts = [(len(plane) - piece) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    sample = np.concatenate([plane[start : start + piece] for start in starts])
    return len(_literals().compress(_view(sample))) < _PAYS * sample.nbytes


class _Coders(threading.local):
    """Compressors and scratch memory of one thread: neither may be shared, and making them anew costs page faults."""

    def __init__(self) -> None:
        self.by_level: dict[int, zstandard.ZstdCompressor] = {}
        self.literals: zstandard.ZstdCompressor | None = None
        self.decompressor: zstandard.ZstdDecompressor | None = None
        self.scratch: Array = np.empty(0, np.uint8)


_coders = _Coders()


def _compressor(level: int) -> zstandard.ZstdCompressor:
    found = _coders.by_level.get(level)
    if found is None:
        found = _coders.by_level[level] = zstandard.ZstdCompressor(level=level)
    return found


def _literals() -> zstandard.ZstdCompressor:
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


def _scratch(nbytes: int) -> Array:
    if _coders.scratch.nbytes < nbytes:
        _coders.scratch = np.empty(nbytes, np.uint8)
    return _coders.scratch[:nbytes]


def _zstd_into(frame: Array, out: Array) -> None:
    if _coders.decompressor is None:
        _coders.decompressor = zstandard.ZstdDecompressor()
    try:
        parameters = zstandard.get_frame_parameters(_view(frame))
        if parameters.content_size != out.nbytes:
            raise _wrong_size(parameters.content_size, out.nbytes)
        data = _coders.decompressor.decompress(_view(frame), max_output_size=out.nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointDamaged(f"a zstd frame cannot be decoded: {error}") from error
    if len(data) != out.nbytes:
        raise _wrong_size(len(data), out.nbytes)
    _put(out, 0, data)


def _blosc_into(frame: Array, out: Array) -> None:
    """Everything the frame says of sizes is checked first: the decoder trusts its header."""
    if frame.nbytes < BLOSC_HEADER_BYTES:
        raise CheckpointDamaged(f"a Blosc frame of {frame.nbytes} bytes is shorter than its header")
    version, _, _, _, nbytes, blocksize, total = _BLOSC_HEADER.unpack_from(_view(frame))
    if version != _BLOSC_FORMAT or total != frame.nbytes:
        raise CheckpointDamaged(f"a Blosc frame of version {version} says {total} bytes and has {frame.nbytes}")
    if nbytes != out.nbytes or blocksize > max(nbytes, 1 << 20):
        raise _wrong_size(nbytes, out.nbytes)
    if not nbytes:
        return
    try:
        blosc.decompress(frame, out)
    except (RuntimeError, ValueError) as error:
        raise CheckpointDamaged(f"a Blosc frame cannot be decoded: {error}") from error


def _wrong_size(found: int, expected: int) -> CheckpointDamaged:
    return CheckpointDamaged(f"a frame decodes to {found} bytes, not to {expected}")


def _blosc_json(cname: str, clevel: int, shuffle: str, item_bytes: int, blocksize: int) -> dict[str, Any]:
    configuration = {
        "typesize": item_bytes,
        "cname": cname,
        "clevel": clevel,
        "shuffle": shuffle,
        "blocksize": blocksize,
    }
    return {"name": "blosc", "configuration": configuration}


def _put(out: Array, position: int, data: bytes) -> int:
    end = position + len(data)
    if end > out.nbytes:
        raise ValueError(f"a frame of {end} bytes does not fit into {out.nbytes}")
    out[position:end] = np.frombuffer(data, np.uint8)
    return end


def _put_length(out: Array, position: int, length: int) -> int:
    return _put(out, position, length.to_bytes(4, "little"))


def _view(array: Array) -> memoryview:
    return array.data
