"""Codecs and data that tests of codecs try on each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES
from asyncckpt.codecs.codecs import Blosc, Zstd
from asyncckpt.protocols import Codec

CODECS: list[Codec] = [
    *(codecs.get(name) for name in codecs.names()),
    Zstd(level=-7),
    Zstd(level=9),
    Zstd(level=19),
    Blosc(cname="lz4", shuffle="noshuffle", clevel=9),
    Blosc(cname="lz4hc", shuffle="bitshuffle", clevel=3),
    Blosc(cname="zlib", shuffle="shuffle", clevel=1),
    Blosc(cname="blosclz", shuffle="bitshuffle", clevel=5),
    Blosc(cname="zstd", shuffle="shuffle", clevel=5, blocksize=4096),
    Blosc(cname="lz4", shuffle="shuffle", clevel=1, blocksize=1 << 20),
]
BLOSC = [codec for codec in CODECS if codec.name in ("blosc", "lz4", "planes", "auto")]
ITEMS = [1, 2, 4, 8]


def label(codec: Any) -> str:
    return "-".join([codec.name, *map(str, codec.to_dict().values())])


every_codec = pytest.mark.parametrize("codec", CODECS, ids=label)


def encode(codec: Codec, data: bytes, item_bytes: int) -> bytes:
    out = np.full(len(data) + FRAME_OVERHEAD_BYTES, 0xA5, np.uint8)
    return bytes(out[: codec.encode(np.frombuffer(data, np.uint8), item_bytes, out)])


def decode(codec: Codec, frame: bytes, nbytes: int) -> bytes:
    """Into the middle of a larger array: nothing beside it may be touched."""
    whole = np.full(nbytes + 128, 0xEE, np.uint8)
    codec.decode(np.frombuffer(frame, np.uint8), whole[64 : 64 + nbytes])
    assert set(whole[:64]) == set(whole[64 + nbytes :]) == {0xEE}, "written past the output"
    return bytes(whole[64 : 64 + nbytes])


def float_bits(kind: str, count: int, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return torch.randn(count, generator=generator).to(dtype).view(torch.uint8).numpy().tobytes()


def special_floats(count: int, seed: int) -> bytes:
    """NaN payloads, denormals, infinities, both zeros."""
    patterns = np.array([0x7FC00001, 0xFF800001, 0x7F800000, 0x00000001, 0x807FFFFF, 0x80000000, 0], np.uint32)
    return np.random.default_rng(seed).choice(patterns, count).tobytes()


STRUCTURED: dict[str, Callable[[int, int], bytes]] = {
    "f32": lambda count, seed: float_bits("f32", count, seed),
    "bf16": lambda count, seed: float_bits("bf16", count, seed),
    "f16": lambda count, seed: float_bits("f16", count, seed),
    "f64": lambda count, seed: np.random.default_rng(seed).normal(size=count).tobytes(),
    "zeros": lambda count, seed: bytes(4 * count),
    "ones": lambda count, seed: b"\xff" * count,
    "arange": lambda count, seed: np.arange(seed, seed + count, dtype=np.int64).tobytes(),
    "special": special_floats,
    "noise": lambda count, seed: np.random.default_rng(seed).bytes(4 * count),
    "half noise": lambda count, seed: np.random.default_rng(seed).bytes(2 * count) + bytes(2 * count),
    "one byte differs": lambda count, seed: bytes(count) + b"\1" + bytes(count),
}

structured = st.builds(
    lambda make, count, seed, cut: make(count, seed)[cut:],
    st.sampled_from(list(STRUCTURED.values())),
    st.integers(0, 20_000) | st.sampled_from([4096, 8192, 16_384, 65_536]),
    st.integers(0, 2**31),
    st.sampled_from([0, 0, 0, 1, 2, 3, 5]),
)
