"""Codecs: any bytes come back, other decoders read the frames, and no frame can do harm."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from numcodecs import blosc
from support.examples import examples, thinned

from asyncckpt import CheckpointDamaged, InvalidOption, UnknownName
from asyncckpt.codecs import blosc as frames
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


def _id(codec: Any) -> str:
    return "-".join([codec.name, *map(str, codec.to_dict().values())])


every_codec = pytest.mark.parametrize("codec", CODECS, ids=_id)


def _encode(codec: Codec, data: bytes, item_bytes: int) -> bytes:
    out = np.full(len(data) + FRAME_OVERHEAD_BYTES, 0xA5, np.uint8)
    return bytes(out[: codec.encode(np.frombuffer(data, np.uint8), item_bytes, out)])


def _decode(codec: Codec, frame: bytes, nbytes: int) -> bytes:
    """Into the middle of a larger array: nothing beside it may be touched."""
    whole = np.full(nbytes + 128, 0xEE, np.uint8)
    codec.decode(np.frombuffer(frame, np.uint8), whole[64 : 64 + nbytes])
    assert set(whole[:64]) == set(whole[64 + nbytes :]) == {0xEE}, "written past the output"
    return bytes(whole[64 : 64 + nbytes])


def _float_bits(kind: str, count: int, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return torch.randn(count, generator=generator).to(dtype).view(torch.uint8).numpy().tobytes()


def _special(count: int, seed: int) -> bytes:
    """NaN payloads, denormals, infinities, both zeros."""
    patterns = np.array([0x7FC00001, 0xFF800001, 0x7F800000, 0x00000001, 0x807FFFFF, 0x80000000, 0], np.uint32)
    return np.random.default_rng(seed).choice(patterns, count).tobytes()


STRUCTURED: dict[str, Callable[[int, int], bytes]] = {
    "f32": lambda count, seed: _float_bits("f32", count, seed),
    "bf16": lambda count, seed: _float_bits("bf16", count, seed),
    "f16": lambda count, seed: _float_bits("f16", count, seed),
    "f64": lambda count, seed: np.random.default_rng(seed).normal(size=count).tobytes(),
    "zeros": lambda count, seed: bytes(4 * count),
    "ones": lambda count, seed: b"\xff" * count,
    "arange": lambda count, seed: np.arange(seed, seed + count, dtype=np.int64).tobytes(),
    "special": _special,
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
anything = st.binary(max_size=300) | structured


# -- there and back ----------------------------------------------------------------------------------------------------


@every_codec
@examples(40)
@given(data=anything, item_bytes=st.sampled_from(ITEMS))
@example(data=b"", item_bytes=4)
@example(data=b"\1", item_bytes=8)
@example(data=bytes(16 << 10), item_bytes=4)
@example(data=bytes((16 << 10) - 1), item_bytes=4)
@example(data=bytes((16 << 10) + 1), item_bytes=2)
def test_any_bytes_come_back(codec: Codec, data: bytes, item_bytes: int) -> None:
    frame = _encode(codec, data, item_bytes)
    assert len(frame) <= len(data) + FRAME_OVERHEAD_BYTES
    assert _decode(codec, frame, len(data)) == data


@every_codec
@pytest.mark.parametrize(("kind", "item_bytes"), thinned(itertools.product(STRUCTURED, ITEMS), 3))
def test_every_kind_of_data_comes_back(kind: str, item_bytes: int, codec: Codec) -> None:
    data = STRUCTURED[kind](40_000, 1)
    frame = _encode(codec, data, item_bytes)
    assert len(frame) <= len(data) + FRAME_OVERHEAD_BYTES
    assert _decode(codec, frame, len(data)) == data


@every_codec
@examples(25)
@given(data=anything, item_bytes=st.sampled_from(ITEMS))
def test_an_attempt_that_gives_up_can_be_stored_as_it_lies(codec: Codec, data: bytes, item_bytes: int) -> None:
    """What ``encode_if_smaller`` answers 0 for is stored with a header before it, and is a frame like any other."""
    out = np.empty(len(data) + FRAME_OVERHEAD_BYTES, np.uint8)
    stored = codec.encode_if_smaller(np.frombuffer(data, np.uint8), item_bytes, out)
    if stored or codec.name not in ("planes", "auto"):
        assert _decode(codec, bytes(out[:stored]), len(data)) == data
        return
    image = np.concatenate([np.empty(16, np.uint8), np.frombuffer(data, np.uint8)])
    assert frames.uncompressed_frame(image, len(data), item_bytes) == len(data) + 16
    assert _decode(codec, image.tobytes(), len(data)) == data


def test_frames_do_not_depend_on_what_was_encoded_before_or_on_which_thread() -> None:
    pieces = [make(9000, 3) for make in STRUCTURED.values()]
    for codec in CODECS:
        expected = [_encode(codec, data, 4) for data in pieces]
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda data, of=codec: _encode(of, data, 4), pieces[::-1] * 5))
        assert found == expected[::-1] * 5


# -- other decoders ----------------------------------------------------------------------------------------------------


@examples(60)
@given(data=structured, item_bytes=st.sampled_from(ITEMS))
def test_blosc_itself_reads_our_frames(data: bytes, item_bytes: int) -> None:
    for codec in BLOSC:
        frame = _encode(codec, data, item_bytes)
        if data:  # numcodecs' Blosc refuses to decode nothing into nothing
            assert bytes(blosc.decompress(frame)) == data
        sizes = struct.unpack_from("<BBBBIII", frame)
        assert sizes[4] == len(data)
        assert sizes[6] == len(frame)


@examples(40)
@given(data=anything, level=st.sampled_from([-3, 1, 5]))
def test_zstd_frames_are_plain_zstd(data: bytes, level: int) -> None:
    frame = _encode(Zstd(level=level), data, 4)
    assert zstandard.ZstdDecompressor().decompress(frame) == data
    if data:  # numcodecs takes a declared size of 0 for none declared
        assert bytes(numcodecs.Zstd().decode(frame)) == data


@examples(40)
@given(data=structured.filter(len), item_bytes=st.sampled_from(ITEMS))
def test_frames_of_other_encoders_are_read(data: bytes, item_bytes: int) -> None:
    for cname in ("lz4", "zstd", "zlib", "blosclz"):
        for shuffle in (0, 1, 2):
            frame = bytes(blosc.compress(data, cname.encode(), 1, shuffle, 0, item_bytes))
            assert _decode(codecs.get("planes"), frame, len(data)) == data
    assert _decode(Zstd(), bytes(numcodecs.Zstd(level=3).encode(data)), len(data)) == data


# -- worth it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "item_bytes", "ratio"), [("f32", 4, 1.15), ("bf16", 2, 1.4)])
@pytest.mark.parametrize("count", [16_384, 1 << 20])
def test_planes_shrinks_normal_floats(kind: str, item_bytes: int, ratio: float, count: int) -> None:
    data = _float_bits(kind, count, 1)
    assert len(data) / len(_encode(codecs.get("planes"), data, item_bytes)) > ratio


@pytest.mark.parametrize("item_bytes", ITEMS)
def test_planes_shrinks_what_is_constant_or_nearly(item_bytes: int) -> None:
    planes = codecs.get("planes")
    assert len(_encode(planes, bytes(1 << 18), item_bytes)) < 20_000
    sparse = np.zeros(1 << 16, np.float32)
    sparse[::97] = 1.5
    assert len(_encode(planes, sparse.tobytes(), item_bytes)) < sparse.nbytes / 2


@pytest.mark.parametrize("nbytes", [0, 1, 15, 128, 4096, (16 << 10) - 1, 16 << 10, 100_001, 1 << 20])
@pytest.mark.parametrize("item_bytes", ITEMS)
@pytest.mark.parametrize("name", ["planes", "auto"])
def test_planes_adds_no_more_than_a_header_to_noise(name: str, item_bytes: int, nbytes: int) -> None:
    data = np.random.default_rng(nbytes).bytes(nbytes)
    frame = _encode(codecs.get(name), data, item_bytes)
    assert len(frame) <= nbytes + 16
    assert _decode(codecs.get(name), frame, nbytes) == data


@examples(60)
@given(data=structured, item_bytes=st.sampled_from(ITEMS))
def test_planes_never_adds_more_than_a_header(data: bytes, item_bytes: int) -> None:
    assert len(_encode(codecs.get("planes"), data, item_bytes)) <= len(data) + 16


# -- hostile frames ----------------------------------------------------------------------------------------------------


def _damaged_or_right_size(codec: Codec, frame: bytes, nbytes: int) -> bytes | None:
    """Decoding ends in the typed error, or fills the output and nothing else."""
    try:
        return _decode(codec, frame, nbytes)
    except CheckpointDamaged:
        return None


@every_codec
@pytest.mark.parametrize("kind", ["f32", "zeros", "noise", "half noise"])
def test_a_truncated_or_extended_frame_is_damage(kind: str, codec: Codec) -> None:
    data = STRUCTURED[kind](6000, 5)
    frame = _encode(codec, data, 4)
    for cut in [*range(min(80, len(frame))), len(frame) // 2, len(frame) - 4, len(frame) - 1]:
        with pytest.raises(CheckpointDamaged):
            _decode(codec, frame[:cut], len(data))
    for more in (b"\0", b"\0" * 16, frame):
        with pytest.raises(CheckpointDamaged):
            _decode(codec, frame + more, len(data))


@every_codec
@pytest.mark.parametrize("change", [-4096, -1, 1, 4096, 1 << 20])
def test_a_frame_of_another_size_than_expected_is_damage(change: int, codec: Codec) -> None:
    data = STRUCTURED["f32"](6000, 5)
    with pytest.raises(CheckpointDamaged):
        _decode(codec, _encode(codec, data, 4), len(data) + change)
    with pytest.raises(CheckpointDamaged):
        _decode(codec, _encode(codec, data, 4), 0)


@pytest.mark.parametrize("codec", BLOSC, ids=_id)
@pytest.mark.parametrize("kind", ["f32", "bf16", "noise", "zeros"])
def test_every_bit_of_a_blosc_header(kind: str, codec: Codec) -> None:
    data = STRUCTURED[kind](6000, 5)
    for item_bytes in (2, 4):
        frame = _encode(codec, data, item_bytes)
        for bit in range(128):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            _damaged_or_right_size(codec, bytes(flipped), len(data))


@pytest.mark.parametrize("codec", BLOSC, ids=_id)
def test_hostile_numbers_in_a_blosc_frame(codec: Codec) -> None:
    data = STRUCTURED["f32"](6000, 5)
    frame = _encode(codec, data, 4)
    numbers = [0, 1, 3, 15, 16, 17, 127, 128, len(data) - 1, len(data), len(frame), 1 << 20, 1 << 24]
    numbers += [2**31 - 1, 2**31, 2**32 - 1, 2**32 - 16, 2**32 - len(frame)]
    for position in range(4, 40, 4):  # sizes, block starts, lengths of parts
        for number in numbers:
            hostile = bytearray(frame)
            hostile[position : position + 4] = number.to_bytes(4, "little")
            _damaged_or_right_size(codec, bytes(hostile), len(data))
    for position in range(4):  # versions, flags, typesize
        for number in range(256):
            hostile = bytearray(frame)
            hostile[position] = number
            _damaged_or_right_size(codec, bytes(hostile), len(data))


@every_codec
@examples(60)
@given(garbage=st.binary(max_size=200), nbytes=st.integers(0, 300) | st.just(1 << 16))
def test_garbage_is_damage_or_fills_the_output(codec: Codec, garbage: bytes, nbytes: int) -> None:
    _damaged_or_right_size(codec, garbage, nbytes)


@pytest.mark.parametrize("codec", BLOSC, ids=_id)
@examples(150)
@given(
    flags=st.integers(0, 255),
    typesize=st.integers(0, 255),
    blocksize=st.integers(0, 2**32 - 1) | st.integers(0, 4096),
    nbytes=st.integers(0, 5000),
    body=st.binary(max_size=400),
    version=st.integers(0, 3),
)
def test_a_consistent_header_before_garbage(
    codec: Codec, flags: int, typesize: int, blocksize: int, nbytes: int, body: bytes, version: int
) -> None:
    header = struct.pack("<BBBBIII", 2, version, flags, typesize, nbytes, blocksize, 16 + len(body))
    _damaged_or_right_size(codec, header + body, nbytes)


@every_codec
@examples(60)
@given(data=st.data())
def test_a_frame_with_random_damage(codec: Codec, data: st.DataObject) -> None:
    content = data.draw(structured)
    frame = bytearray(_encode(codec, content, data.draw(st.sampled_from(ITEMS))))
    for _ in range(data.draw(st.integers(1, 4))):
        if frame:
            frame[data.draw(st.integers(0, min(len(frame), 64) - 1) | st.integers(0, len(frame) - 1))] = data.draw(
                st.integers(0, 255)
            )
    _damaged_or_right_size(codec, bytes(frame), len(content))


MOST_BYTES = 64 << 20


def _fresh_peak() -> None:
    """Forget how much memory this process ever had."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("no peak to be reset here")


def _memory(kind: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) << 10


def _costs(codec: Codec, frame: bytes, nbytes: int) -> int:
    """Decode a bomb, which is damage; the memory that took."""
    _fresh_peak()
    before = _memory("VmRSS")
    with pytest.raises(CheckpointDamaged):
        _decode(codec, frame, nbytes)
    return _memory("VmHWM") - before


def test_a_zstd_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 30))
    assert len(bomb) < 1 << 20
    assert _costs(Zstd(), bomb, 4096) < MOST_BYTES
    streamed = zstandard.ZstdCompressor(level=3, write_content_size=False).compressobj()  # declares no size
    silent = b"".join([streamed.compress(bytes(1 << 20)) for _ in range(512)]) + streamed.flush()
    assert zstandard.get_frame_parameters(silent).content_size == zstandard.CONTENTSIZE_UNKNOWN
    assert _costs(Zstd(), silent, 4096) < MOST_BYTES


def test_a_zstd_frame_that_lies_about_its_size_is_refused() -> None:
    frame = bytearray(zstandard.ZstdCompressor(level=3).compress(bytes(300 << 20)))
    assert frame[4] & 0xC0 == 0x80, "a content size of 4 bytes"
    at = 5 if frame[4] & 0x20 else 6
    assert int.from_bytes(frame[at : at + 4], "little") == 300 << 20
    frame[at : at + 4] = (70_000).to_bytes(4, "little")
    assert _costs(Zstd(), bytes(frame), 70_000) < MOST_BYTES
    frame[at : at + 4] = (2**32 - 1).to_bytes(4, "little")
    assert _costs(Zstd(), bytes(frame), 70_000) < MOST_BYTES


def test_a_zstd_window_of_gigabytes_is_not_allocated() -> None:
    window = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x80, 0xA8])  # a content size of 4 bytes, a window of 2 GiB
    frame = window + (4096).to_bytes(4, "little") + bytes([3 | 64, 0, 0])
    _fresh_peak()
    before = _memory("VmRSS")
    with contextlib.suppress(CheckpointDamaged):
        _decode(Zstd(), frame, 4096)
    assert _memory("VmHWM") - before < MOST_BYTES


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A gigabyte in a few megabytes."""
    packed = bytes(blosc.compress(bytes(1 << 30), b"zstd", 3, 1, 0, 4))
    assert len(packed) < 4 << 20
    return packed


@pytest.mark.parametrize("codec", BLOSC, ids=_id)
def test_a_blosc_bomb_is_refused_before_it_is_unpacked(codec: Codec, bomb: bytes) -> None:
    assert _costs(codec, bomb, 4096) < MOST_BYTES
    lying = bytearray(bomb)
    lying[4:8] = (4096).to_bytes(4, "little")  # the size that is expected; the blocks inside are larger
    assert _costs(codec, bytes(lying), 4096) < MOST_BYTES
    empty = struct.pack("<BBBBIII", 2, 1, 0x81, 4, 4096, 2**31 - 1, 16)
    assert _costs(codec, empty, 4096) < MOST_BYTES


def test_a_block_inside_a_blosc_frame_that_unpacks_to_more_is_damage() -> None:
    """The zstd frame of one plane is a bomb; everything in the header is as it should be."""
    inner = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 28))
    body = struct.pack("<I", 20) + struct.pack("<I", len(inner)) + inner
    header = struct.pack("<BBBBIII", 2, 1, 0x81 | 0x10, 4, 65_536, 65_536, 16 + len(body))
    assert _costs(codecs.get("planes"), header + body, 65_536) < MOST_BYTES


# -- names and options -------------------------------------------------------------------------------------------------


def test_names_are_the_documented_ones() -> None:
    assert set(codecs.names()) == {"none", "lz4", "zstd", "blosc", "planes", "auto"}
    for name in codecs.names():
        assert codecs.get(name).name == name
    assert codecs.get(CODECS[-1]) is CODECS[-1]


@every_codec
def test_options_make_the_same_codec_again(codec: Codec) -> None:
    assert codecs.get(codec.name, codec.to_dict()) == codec


@pytest.mark.parametrize("name", ["", "zip", "Planes", "zstd ", "../zstd", "pickle"])
def test_an_unknown_name_is_typed_and_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownName, match="planes"):
        codecs.get(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zstd", {"level": 23}),
        ("zstd", {"level": -8}),
        ("zstd", {"level": 1.5}),
        ("zstd", {"level": True}),
        ("zstd", {"level": "1"}),
        ("zstd", {"level": None}),
        ("zstd", {"levels": 1}),
        ("planes", {"level": 1}),
        ("none", {"x": 1}),
        ("lz4", {"clevel": 1}),
        ("auto", {"": 1}),
        ("blosc", {"cname": "snappy"}),
        ("blosc", {"cname": 1}),
        ("blosc", {"cname": []}),
        ("blosc", {"clevel": 0}),
        ("blosc", {"clevel": 10}),
        ("blosc", {"clevel": "9"}),
        ("blosc", {"shuffle": "yes"}),
        ("blosc", {"shuffle": 1}),
        ("blosc", {"shuffle": {}}),
        ("blosc", {"blocksize": -1}),
        ("blosc", {"blocksize": 1.0}),
        ("blosc", {"blocksize": 1 << 62}),
        ("blosc", {"nthreads": 3}),
    ],
    ids=str,
)
def test_a_bad_option_is_typed(name: str, options: dict[str, Any]) -> None:
    """Options are read from manifests too, so they are checked like anything else there."""
    with pytest.raises(InvalidOption):
        codecs.get(name, options)
