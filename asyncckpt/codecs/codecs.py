"""The codecs are frozen dataclasses in a table by name; the manifest records the name and the options.

Every frame is a Blosc 1 frame or a zstd frame, which zarr's own codecs read, so nothing of this library is needed to
decode a checkpoint. Whatever takes long releases the GIL. The contract of the methods is ``protocols.Codec``.
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
    entropy_coder,
    put,
    put_header,
    put_length,
    scratch,
    uncompressed_frame,
    wrong_size,
    zstd_into,
)
from asyncckpt.errors import InvalidOption, UnknownName
from asyncckpt.protocols import Codec

#: Decoders before c-blosc 1.21 expect a block to be split only where each plane has this many bytes.
_MIN_PLANE_BYTES: Final = 128
#: A smaller chunk is stored as it is: a file system block is 4 KiB, and the calls would cost more than the bytes.
MIN_PLANES_CHUNK_BYTES: Final = 16 << 10
#: Blosc itself takes far larger blocks, but a decoder needs three times a block's memory.
_MAX_BLOCK_BYTES: Final = 64 << 20
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 8 << 10
#: A plane is compressed where its sample shrinks below this part of its size.
_PAYS: Final = 0.97

Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
_SHUFFLES: Final[Mapping[str, int]] = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """``none`` stores the bytes as they are."""

    name: ClassVar[str] = "none"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        out[: data.nbytes] = data
        return data.nbytes

    encode_if_smaller = encode

    def decode(self, frame: Array, out: Array) -> None:
        if frame.nbytes != out.nbytes:
            raise wrong_size(frame.nbytes, out.nbytes)
        out[:] = frame

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Zstd:
    """``zstd`` stores plain zstd frames at ``level``, from -7 to 22. Raises ``InvalidOption``."""

    name: ClassVar[str] = "zstd"
    level: int = 1

    def __post_init__(self) -> None:
        if type(self.level) is not int or not -7 <= self.level <= 22:
            raise InvalidOption(f"Zstd: level must be a whole number from -7 to 22, not {self.level!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return put(out, 0, compressor(self.level).compress(as_view(data)))

    encode_if_smaller = encode

    def decode(self, frame: Array, out: Array) -> None:
        zstd_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return [{"name": "zstd", "configuration": {"level": self.level, "checksum": False}}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blosc:
    """``blosc`` stores the frames of numcodecs' Blosc. ``cname`` names the compressor inside: ``lz4``, ``lz4hc``,
    ``zlib``, ``zstd`` or ``blosclz``. ``clevel`` is its level, from 1 to 9; ``shuffle`` is ``noshuffle``, ``shuffle``
    (bytes) or ``bitshuffle``; ``blocksize`` is in bytes, up to 64 MiB, and 0 lets Blosc choose it. Raises
    ``InvalidOption``."""

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

    encode_if_smaller = encode

    def decode(self, frame: Array, out: Array) -> None:
        blosc_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return [_blosc_json(self.cname, self.clevel, self.shuffle, item_bytes, self.blocksize)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lz4:
    """``lz4`` stores LZ4 over transposed bits, in Blosc frames. It is the fastest codec for data that is not noise."""

    name: ClassVar[str] = "lz4"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return _LZ4.encode(data, item_bytes, out)

    encode_if_smaller = encode

    def decode(self, frame: Array, out: Array) -> None:
        blosc_into(frame, out)

    def zarr(self, item_bytes: int) -> list[dict[str, Any]]:
        return _LZ4.zarr(item_bytes)


_LZ4 = Blosc(cname="lz4", clevel=1, shuffle="bitshuffle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """``planes`` is made for floats. It splits the bytes of a chunk into planes (the first byte of every item, the
    second byte of every item, and so on), compresses the planes of which a sample shrinks, and stores the others as
    they are: mantissas are noise.

    A frame is a Blosc frame of one shuffled, split block, so every Blosc decoder reads it. The compressor is zstd with
    its search for matches all but turned off (docs/design/005-codecs.md).
    """

    name: ClassVar[str] = "planes"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return self.encode_if_smaller(data, item_bytes, out) or _copied(data, item_bytes, out)

    def encode_if_smaller(self, data: Array, item_bytes: int, out: Array) -> int:
        count = data.nbytes // item_bytes
        if data.nbytes < MIN_PLANES_CHUNK_BYTES or count * item_bytes != data.nbytes or count < _MIN_PLANE_BYTES:
            return 0
        items = data.reshape(count, item_bytes)
        return self.encode_planes_if_smaller([items[:, plane] for plane in range(item_bytes)], out)

    def encode_planes_if_smaller(self, planes: Sequence[Array], out: Array) -> int:
        """Do what ``encode_if_smaller`` does for data that is split into its planes already: encode them into ``out``
        and return the frame's size, or 0 where the chunk had better be stored as it is."""
        item_bytes, count = len(planes), len(planes[0])
        paying = [number for number, plane in enumerate(planes) if _pays(plane)]
        if not paying:
            return 0
        position = BLOSC_HEADER_BYTES + 4  # the header is followed by the offset of the one block
        for number, plane in enumerate(planes):
            if number in paying:
                packed = entropy_coder().compress(as_view(_contiguous(plane)))
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
    """``auto`` is ``planes`` where that does not make saves slower: it compresses a chunk only while compression is
    faster than the disk, as measured in this run. Its frames are those of ``planes``."""

    name: ClassVar[str] = "auto"

    def to_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Array, item_bytes: int, out: Array) -> int:
        return _PLANES.encode(data, item_bytes, out)

    def encode_if_smaller(self, data: Array, item_bytes: int, out: Array) -> int:
        return _PLANES.encode_if_smaller(data, item_bytes, out)

    def encode_planes_if_smaller(self, planes: Sequence[Array], out: Array) -> int:
        return _PLANES.encode_planes_if_smaller(planes, out)

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
    """Return the codec of that name, made with the options in ``configuration``, or ``codec`` itself where it is one.
    Raises ``UnknownName`` for the name and ``InvalidOption`` for the options."""
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
    """Return the names of all codecs."""
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
    return uncompressed_frame(out, data.nbytes, item_bytes)


def _pays(plane: Array) -> bool:
    piece = min(_SAMPLE_BYTES, len(plane) // _SAMPLES)
    starts = [(len(plane) - piece) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    sample = np.concatenate([plane[start : start + piece] for start in starts])
    return len(entropy_coder().compress(as_view(sample))) < _PAYS * sample.nbytes
