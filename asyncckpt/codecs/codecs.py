"""Codecs: bytes of one chunk ↔ a frame. Frozen dataclasses and a table by name; the name goes into the manifest.

Every frame is one that zarr's own codecs read: a Blosc 1 frame or a zstd frame, so nothing of this library is needed to
decode a checkpoint. All hot calls release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np

from asyncckpt.codecs.blosc import (
    BLOSC_HEADER_BYTES,
    Array,
    as_view,
    blosc,
    blosc_into,
    compressor,
    literals,
    put,
    put_header,
    put_length,
    scratch,
    stored_frame,
    wrong_size,
    zstd_into,
)
from asyncckpt.errors import InvalidOption, UnknownName
from asyncckpt.protocols import Codec

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
            raise wrong_size(frame.nbytes, out.nbytes)
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
        return put(out, 0, compressor(self.level).compress(as_view(data)))

    attempt = encode

    def decode(self, frame: Array, out: Array) -> None:
        zstd_into(frame, out)

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
        frame: bytes = blosc().compress(data, self.cname.encode(), self.clevel, shuffle, self.blocksize, item_bytes)
        return put(out, 0, frame)

    attempt = encode

    def decode(self, frame: Array, out: Array) -> None:
        blosc_into(frame, out)

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
        blosc_into(frame, out)

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
                packed = literals().compress(as_view(_contiguous(plane)))
                if len(packed) < count:
                    position = put_length(out, position, len(packed))
                    position = put(out, position, packed)
                    continue
            position = put_length(out, position, count)
            np.copyto(out[position : position + count], plane)
            position += count
        if position >= count * item_bytes + BLOSC_HEADER_BYTES:
            return 0
        put_header(out, item_bytes, count * item_bytes, position)
        return position

    def decode(self, frame: Array, out: Array) -> None:
        blosc_into(frame, out)

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
        blosc_into(frame, out)

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


def _blosc_json(cname: str, clevel: int, shuffle: str, item_bytes: int, blocksize: int) -> dict[str, Any]:
    configuration = {
        "typesize": item_bytes,
        "cname": cname,
        "clevel": clevel,
        "shuffle": shuffle,
        "blocksize": blocksize,
    }
    return {"name": "blosc", "configuration": configuration}


def _contiguous(plane: Array) -> Array:
    if plane.flags.c_contiguous:
        return plane
    place = scratch(len(plane))
    np.copyto(place, plane)
    return place


def _copied(data: Array, item_bytes: int, out: Array) -> int:
    out[BLOSC_HEADER_BYTES : BLOSC_HEADER_BYTES + data.nbytes] = data
    return stored_frame(out, data.nbytes, item_bytes)


def _pays(plane: Array) -> bool:
    piece = min(_SAMPLE_BYTES, len(plane) // _SAMPLES)
    starts = [(len(plane) - piece) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    sample = np.concatenate([plane[start : start + piece] for start in starts])
    return len(literals().compress(as_view(sample))) < _PAYS * sample.nbytes
