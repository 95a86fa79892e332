"""No frame can do harm: it is refused as damage, or it fills exactly the bytes that were asked for."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc
from support.codec_data import BLOSC, ITEMS, STRUCTURED, decode, encode, every_codec, label, structured
from support.examples import examples

from asyncckpt import CheckpointDamaged
from asyncckpt.codecs import codecs
from asyncckpt.codecs.codecs import Zstd
from asyncckpt.protocols import Codec


def _damaged_or_right_size(codec: Codec, frame: bytes, nbytes: int) -> bytes | None:
    """Decoding ends in the typed error, or fills the output and nothing else."""
    try:
        return decode(codec, frame, nbytes)
    except CheckpointDamaged:
        return None


@every_codec
@pytest.mark.parametrize("kind", ["f32", "zeros", "noise", "half noise"])
def test_a_truncated_or_extended_frame_is_damage(kind: str, codec: Codec) -> None:
    data = STRUCTURED[kind](6000, 5)
    frame = encode(codec, data, 4)
    for cut in [*range(min(80, len(frame))), len(frame) // 2, len(frame) - 4, len(frame) - 1]:
        with pytest.raises(CheckpointDamaged):
            decode(codec, frame[:cut], len(data))
    for more in (b"\0", b"\0" * 16, frame):
        with pytest.raises(CheckpointDamaged):
            decode(codec, frame + more, len(data))


@every_codec
@pytest.mark.parametrize("change", [-4096, -1, 1, 4096, 1 << 20])
def test_a_frame_of_another_size_than_expected_is_damage(change: int, codec: Codec) -> None:
    data = STRUCTURED["f32"](6000, 5)
    with pytest.raises(CheckpointDamaged):
        decode(codec, encode(codec, data, 4), len(data) + change)
    with pytest.raises(CheckpointDamaged):
        decode(codec, encode(codec, data, 4), 0)


@pytest.mark.parametrize("codec", BLOSC, ids=label)
@pytest.mark.parametrize("kind", ["f32", "bf16", "noise", "zeros"])
def test_every_bit_of_a_blosc_header(kind: str, codec: Codec) -> None:
    data = STRUCTURED[kind](6000, 5)
    for item_bytes in (2, 4):
        frame = encode(codec, data, item_bytes)
        for bit in range(128):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            _damaged_or_right_size(codec, bytes(flipped), len(data))


@pytest.mark.parametrize("codec", BLOSC, ids=label)
def test_hostile_numbers_in_a_blosc_frame(codec: Codec) -> None:
    data = STRUCTURED["f32"](6000, 5)
    frame = encode(codec, data, 4)
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


@pytest.mark.parametrize("codec", BLOSC, ids=label)
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
    frame = bytearray(encode(codec, content, data.draw(st.sampled_from(ITEMS))))
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
        decode(codec, frame, nbytes)
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
        decode(Zstd(), frame, 4096)
    assert _memory("VmHWM") - before < MOST_BYTES


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A gigabyte in a few megabytes."""
    packed = bytes(blosc.compress(bytes(1 << 30), b"zstd", 3, 1, 0, 4))
    assert len(packed) < 4 << 20
    return packed


@pytest.mark.parametrize("codec", BLOSC, ids=label)
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
