"""The codecs of this library and their peers compress behind one protocol, each on one core.

Chunks go in one by one, as an engine would hand them over, and a frame may be dropped before the next is made: a list
of all frames would charge those whose API returns ``bytes`` with page faults for memory that no engine keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import torch
from numcodecs import blosc

from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES, Array
from asyncckpt.protocols import Codec
from benchmarks.suites.codecs.groups import CHUNK_BYTES

OURS: Final = "planes"
OWN: Final = (OURS, "lz4", "zstd", "blosc")
#: The versions of these packages belong under a table.
PACKAGES: Final = ("numcodecs", "zstandard", "zipnn", "pcodec")
_FREED_BYTES: Final = 31 << 20
#: This is their default; lower levels are up to half as fast again, and store most of what could be saved.
_PCODEC_LEVEL: Final = 8


class Contender(Protocol):
    """A contender is one compressor set up for items of one size. Not thread-safe."""

    label: str

    def prepare(self, chunk: Array) -> Any:
        """Return the chunk as this library takes it. This is not timed."""

    def encode(self, prepared: Any) -> Any:
        """Return a frame, bytes-like, which is good until the next call."""

    def decode(self, frame: bytes, out: Array) -> Any:
        """Return the data, bytes-like: in ``out`` where the API allows, in memory of its own elsewhere."""


class OwnCodec:
    """Runs a codec of this library into a warm buffer, as in the engine."""

    def __init__(self, codec: Codec, item_bytes: int) -> None:
        self.label = codec.name
        self._codec = codec
        self._item_bytes = item_bytes
        self._out: Array = np.zeros(CHUNK_BYTES + FRAME_OVERHEAD_BYTES, np.uint8)

    def prepare(self, chunk: Array) -> Array:
        return chunk

    def encode(self, prepared: Array) -> Array:
        return self._out[: self._codec.encode(prepared, self._item_bytes, self._out)]

    def decode(self, frame: bytes, out: Array) -> Array:
        self._codec.decode(np.frombuffer(frame, np.uint8), out)
        return out


class _Numcodecs:
    """Runs a codec of numcodecs, which takes the item size from the array."""

    def __init__(self, label: str, codec: Any, item_bytes: int) -> None:
        self.label = label
        self._codec = codec
        self._items = np.dtype(f"u{item_bytes}")

    def prepare(self, chunk: Array) -> Any:
        return chunk.view(self._items)

    def encode(self, prepared: Any) -> Any:
        return self._codec.encode(prepared)

    def decode(self, frame: bytes, out: Array) -> Any:
        return self._codec.decode(frame, out=out)


class _ZipNN:
    """Runs zipnn on bytes. It rotates the bits of its input in place, even of ``bytes``, so it gets a copy, which is
    not timed."""

    label = "zipnn"

    def __init__(self, item_bytes: int) -> None:
        from zipnn import ZipNN

        dtype = {2: "bfloat16", 4: "float32"}[item_bytes]
        self._codec = ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)

    def prepare(self, chunk: Array) -> bytes:
        return chunk.tobytes()

    def encode(self, prepared: bytes) -> Any:
        return self._codec.compress(prepared)

    def decode(self, frame: bytes, out: Array) -> Any:
        return self._codec.decompress(frame)


class _Pcodec:
    """Runs pcodec without its search for a mode and deltas, which finds next to nothing in noise and costs a third of
    the speed. It does not know bfloat16, and gets uint16 instead."""

    label = f"pcodec {_PCODEC_LEVEL}"

    def __init__(self, item_bytes: int) -> None:
        from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

        self._standalone = standalone
        self._config = ChunkConfig(
            compression_level=_PCODEC_LEVEL, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op()
        )
        self._items = np.dtype({2: np.uint16, 4: np.float32}[item_bytes])

    def prepare(self, chunk: Array) -> Any:
        return chunk.view(self._items)

    def encode(self, prepared: Any) -> Any:
        return self._standalone.simple_compress(prepared, self._config)

    def decode(self, frame: bytes, out: Array) -> Any:
        self._standalone.simple_decompress_into(frame, out.view(self._items))
        return out


def contenders(item_bytes: int) -> tuple[list[Contender], list[str]]:
    """Return everyone who is installed, and a note on each who is not."""
    found: list[Contender] = [OwnCodec(codecs.get(name), item_bytes) for name in OWN]
    notes: list[str] = []
    makers: dict[str, Callable[[int], list[Contender]]] = {
        "numcodecs": _numcodecs,
        "zipnn": lambda size: [_ZipNN(size)],
        "pcodec": lambda size: [_Pcodec(size)],
    }
    for package, make in makers.items():
        try:
            found += make(item_bytes)
        except ImportError:
            notes.append(f"{package} is not installed: pip install 'asyncckpt[peers]'")
    return found, notes


def _numcodecs(item_bytes: int) -> list[Contender]:
    import numcodecs

    return [
        _Numcodecs("numcodecs zstd 1", numcodecs.Zstd(level=1), item_bytes),
        *(
            _Numcodecs(f"numcodecs Blosc zstd 1 {label}", numcodecs.Blosc("zstd", 1, shuffle), item_bytes)
            for label, shuffle in (
                ("bitshuffle", numcodecs.Blosc.BITSHUFFLE),
                ("shuffle", numcodecs.Blosc.SHUFFLE),
            )
        ),
    ]


@contextmanager
def one_core() -> Iterator[None]:
    """Keep libraries from starting threads inside, and keep freed memory for the next allocation."""
    torch_threads, blosc_threads = torch.get_num_threads(), blosc.use_threads
    # glibc keeps twice the largest block that was ever freed, 32 MiB at most. With less, libraries that make their
    # buffers anew for each chunk pay for page faults, or do not, depending on what ran before them: up to half their
    # speed.
    np.empty(_FREED_BYTES, np.uint8)
    torch.set_num_threads(1)
    blosc.use_threads = False
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        blosc.use_threads = blosc_threads
