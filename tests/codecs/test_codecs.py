"""Any bytes come back from any codec, other decoders read the frames, and options mean what is documented."""

from __future__ import annotations

import itertools
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numcodecs
import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from numcodecs import blosc
from support.codec_data import BLOSC, CODECS, ITEMS, STRUCTURED, decode, encode, every_codec, float_bits, structured
from support.examples import examples, thinned

from asyncckpt import InvalidOption, UnknownName
from asyncckpt.codecs import blosc as frames
from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import FRAME_OVERHEAD_BYTES
from asyncckpt.codecs.codecs import Zstd
from asyncckpt.protocols import Codec

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
    frame = encode(codec, data, item_bytes)
    assert len(frame) <= len(data) + FRAME_OVERHEAD_BYTES
    assert decode(codec, frame, len(data)) == data


@every_codec
@pytest.mark.parametrize(("kind", "item_bytes"), thinned(itertools.product(STRUCTURED, ITEMS), 3))
def test_every_kind_of_data_comes_back(kind: str, item_bytes: int, codec: Codec) -> None:
    data = STRUCTURED[kind](40_000, 1)
    frame = encode(codec, data, item_bytes)
    assert len(frame) <= len(data) + FRAME_OVERHEAD_BYTES
    assert decode(codec, frame, len(data)) == data


@every_codec
@examples(25)
@given(data=anything, item_bytes=st.sampled_from(ITEMS))
def test_an_attempt_that_gives_up_can_be_stored_as_it_lies(codec: Codec, data: bytes, item_bytes: int) -> None:
    """What ``encode_if_smaller`` answers 0 for is stored with a header before it, and is a frame like any other."""
    out = np.empty(len(data) + FRAME_OVERHEAD_BYTES, np.uint8)
    stored = codec.encode_if_smaller(np.frombuffer(data, np.uint8), item_bytes, out)
    if stored or codec.name not in ("planes", "auto"):
        assert decode(codec, bytes(out[:stored]), len(data)) == data
        return
    image = np.concatenate([np.empty(16, np.uint8), np.frombuffer(data, np.uint8)])
    assert frames.uncompressed_frame(image, len(data), item_bytes) == len(data) + 16
    assert decode(codec, image.tobytes(), len(data)) == data


def test_frames_do_not_depend_on_what_was_encoded_before_or_on_which_thread() -> None:
    pieces = [make(9000, 3) for make in STRUCTURED.values()]
    for codec in CODECS:
        expected = [encode(codec, data, 4) for data in pieces]
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda data, of=codec: encode(of, data, 4), pieces[::-1] * 5))
        assert found == expected[::-1] * 5


# -- other decoders ----------------------------------------------------------------------------------------------------


@examples(60)
@given(data=structured, item_bytes=st.sampled_from(ITEMS))
def test_blosc_itself_reads_our_frames(data: bytes, item_bytes: int) -> None:
    for codec in BLOSC:
        frame = encode(codec, data, item_bytes)
        if data:  # numcodecs' Blosc refuses to decode nothing into nothing
            assert bytes(blosc.decompress(frame)) == data
        sizes = struct.unpack_from("<BBBBIII", frame)
        assert sizes[4] == len(data)
        assert sizes[6] == len(frame)


@examples(40)
@given(data=anything, level=st.sampled_from([-3, 1, 5]))
def test_zstd_frames_are_plain_zstd(data: bytes, level: int) -> None:
    frame = encode(Zstd(level=level), data, 4)
    assert zstandard.ZstdDecompressor().decompress(frame) == data
    if data:  # numcodecs takes a declared size of 0 for none declared
        assert bytes(numcodecs.Zstd().decode(frame)) == data


@examples(40)
@given(data=structured.filter(len), item_bytes=st.sampled_from(ITEMS))
def test_frames_of_other_encoders_are_read(data: bytes, item_bytes: int) -> None:
    for cname in ("lz4", "zstd", "zlib", "blosclz"):
        for shuffle in (0, 1, 2):
            frame = bytes(blosc.compress(data, cname.encode(), 1, shuffle, 0, item_bytes))
            assert decode(codecs.get("planes"), frame, len(data)) == data
    assert decode(Zstd(), bytes(numcodecs.Zstd(level=3).encode(data)), len(data)) == data


# -- worth it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "item_bytes", "ratio"), [("f32", 4, 1.15), ("bf16", 2, 1.4)])
@pytest.mark.parametrize("count", [16_384, 1 << 20])
def test_planes_shrinks_normal_floats(kind: str, item_bytes: int, ratio: float, count: int) -> None:
    data = float_bits(kind, count, 1)
    assert len(data) / len(encode(codecs.get("planes"), data, item_bytes)) > ratio


@pytest.mark.parametrize("item_bytes", ITEMS)
def test_planes_shrinks_what_is_constant_or_nearly(item_bytes: int) -> None:
    planes = codecs.get("planes")
    assert len(encode(planes, bytes(1 << 18), item_bytes)) < 20_000
    sparse = np.zeros(1 << 16, np.float32)
    sparse[::97] = 1.5
    assert len(encode(planes, sparse.tobytes(), item_bytes)) < sparse.nbytes / 2


@pytest.mark.parametrize("nbytes", [0, 1, 15, 128, 4096, (16 << 10) - 1, 16 << 10, 100_001, 1 << 20])
@pytest.mark.parametrize("item_bytes", ITEMS)
@pytest.mark.parametrize("name", ["planes", "auto"])
def test_planes_adds_no_more_than_a_header_to_noise(name: str, item_bytes: int, nbytes: int) -> None:
    data = np.random.default_rng(nbytes).bytes(nbytes)
    frame = encode(codecs.get(name), data, item_bytes)
    assert len(frame) <= nbytes + 16
    assert decode(codecs.get(name), frame, nbytes) == data


@examples(60)
@given(data=structured, item_bytes=st.sampled_from(ITEMS))
def test_planes_never_adds_more_than_a_header(data: bytes, item_bytes: int) -> None:
    assert len(encode(codecs.get("planes"), data, item_bytes)) <= len(data) + 16


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
