"""These tests say what every codec has to do; a subclass runs them with pytest alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import BLOSC_HEADER_BYTES, FRAME_OVERHEAD_BYTES, uncompressed_frame
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.protocols import Codec

#: Chunks are made of items of these widths.
ITEM_BYTES = (1, 2, 4, 8)
#: Codecs change their ways around these sizes: nothing, odd ones, blocks of file systems and of coders.
SIZES = (0, 1, 7, 15, 16, 129, 4096, (16 << 10) - 1, 16 << 10, (16 << 10) + 8, 100_001)
#: This many bytes around an output may not be touched.
_GUARD_BYTES = 64
_GUARD = 0xEE


class CodecContract:
    """Tests what ``protocols.Codec`` promises. A subclass says which codec it is."""

    def codec(self) -> Codec:
        """Return the codec that is tested."""
        raise NotImplementedError("a subclass returns its codec here")

    @pytest.mark.parametrize("item_bytes", ITEM_BYTES)
    def test_every_bit_comes_back(self, item_bytes: int) -> None:
        for what, data in _chunks():
            frame = _encoded(self.codec(), data, item_bytes)
            assert _decoded(self.codec(), frame, len(data)) == data, what

    @pytest.mark.parametrize("item_bytes", ITEM_BYTES)
    def test_an_attempt_gives_a_frame_or_leaves_the_data_to_a_header(self, item_bytes: int) -> None:
        for what, data in _chunks():
            frame = _framed(self.codec().encode_if_smaller, data, item_bytes)
            if not data:
                continue  # ``encode_if_smaller`` may answer either way where there is no data
            if not frame:  # a chunk stored as it is lies behind a header
                image = np.concatenate([np.zeros(BLOSC_HEADER_BYTES, np.uint8), np.frombuffer(data, np.uint8)])
                assert uncompressed_frame(image, len(data), item_bytes) == len(data) + BLOSC_HEADER_BYTES
                frame = image.tobytes()
            assert _decoded(self.codec(), frame, len(data)) == data, what

    def test_the_data_is_left_as_it_is(self) -> None:
        for what, data in _chunks():
            given = np.frombuffer(bytearray(data), np.uint8)
            self.codec().encode(given, 4, np.empty(len(data) + FRAME_OVERHEAD_BYTES, np.uint8))
            assert given.tobytes() == data, what

    def test_a_frame_that_was_cut_off_is_damage(self) -> None:
        for what, data in _chunks():
            frame = _encoded(self.codec(), data, 4)
            cuts = {*range(min(80, len(frame))), len(frame) // 2, max(len(frame) - 1, 0)}
            for cut in cuts if data else ():  # of no data, nothing can be lost
                _check_refused(self.codec(), frame[:cut], len(data), f"{what}, {cut} of {len(frame)} bytes")

    def test_a_frame_with_something_behind_it_is_damage(self) -> None:
        for what, data in _chunks():
            frame = _encoded(self.codec(), data, 4)
            for more in (b"\0", b"\0" * 16, frame) if data else ():
                _check_refused(self.codec(), frame + more, len(data), f"{what}, and {len(more)} bytes")

    @pytest.mark.parametrize("change", [-4096, -1, 1, 4096, 1 << 20])
    def test_a_frame_of_another_size_than_the_output_is_damage(self, change: int) -> None:
        for what, data in _chunks():
            if len(data) + change >= 0:
                _check_refused(self.codec(), _encoded(self.codec(), data, 4), len(data) + change, what)

    @pytest.mark.parametrize("nbytes", [0, 1, 300, 1 << 16])
    def test_garbage_is_damage_or_fills_the_output_and_nothing_else(self, nbytes: int) -> None:
        rng = np.random.default_rng(nbytes)
        for size in (0, 1, 4, 15, 16, 17, 40, 200, nbytes):
            for _ in range(20):
                _decoded_or_damaged(self.codec(), rng.bytes(size), nbytes)

    def test_a_flipped_bit_is_damage_or_fills_the_output_and_nothing_else(self) -> None:
        rng = np.random.default_rng(7)
        for _, data in _chunks():
            frame = _encoded(self.codec(), data, 4)
            bits = {*range(min(8 * len(frame), 256)), *rng.integers(0, max(1, 8 * len(frame)), 20).tolist()}
            for bit in bits if frame else ():
                flipped = bytearray(frame)
                flipped[bit // 8] ^= 1 << bit % 8
                _decoded_or_damaged(self.codec(), bytes(flipped), len(data))

    def test_threads_that_share_it_make_the_frames_that_one_makes(self) -> None:
        codec, chunks = self.codec(), [data for _, data in _chunks()]
        alone = [_encoded(codec, data, 4) for data in chunks]

        def there_and_back(number: int) -> tuple[bytes, bytes]:
            frame = _encoded(codec, chunks[number], 4)
            return frame, _decoded(codec, frame, len(chunks[number]))

        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(there_and_back, [*range(len(chunks))] * 3))
        assert together == list(zip(alone, chunks, strict=True)) * 3

    def test_its_name_and_options_make_it_again(self) -> None:
        codec = self.codec()
        again = codecs.get(codec.name, json.loads(json.dumps(codec.to_dict())))
        assert type(again) is type(codec)
        assert again.to_dict() == codec.to_dict()

    @pytest.mark.parametrize("item_bytes", ITEM_BYTES)
    def test_zarr_reads_its_frames(self, item_bytes: int, tmp_path: Path) -> None:
        zarr = pytest.importorskip("zarr", minversion="3.1")
        for number, (what, data) in enumerate(_chunks()):
            count = len(data) // item_bytes
            if not count:
                continue  # zarr never has chunks without items
            whole = data[: count * item_bytes]
            folder = tmp_path / str(number)
            (folder / "c").mkdir(parents=True)
            (folder / "zarr.json").write_text(json.dumps(_array_json(self.codec(), count, item_bytes)))
            (folder / "c" / "0").write_bytes(_encoded(self.codec(), whole, item_bytes))
            assert zarr.open_array(folder, mode="r")[:].tobytes() == whole, what


def _chunks() -> Iterator[tuple[str, bytes]]:
    """Yield chunks of data, the same ones every time, each with its description."""
    rng = np.random.default_rng(1)
    for nbytes in SIZES:
        yield f"{nbytes} zeros", bytes(nbytes)
        yield f"{nbytes} bytes of noise", rng.bytes(nbytes)
        yield f"{nbytes} bytes of floats", rng.normal(size=nbytes // 4 + 1).astype(np.float32).tobytes()[:nbytes]
    yield "half noise, half zeros", rng.bytes(20_000) + bytes(20_000)
    yield "rising integers", np.arange(6000, dtype=np.int64).tobytes()


def _framed(encode: Any, data: bytes, item_bytes: int) -> bytes:
    """Return what ``encode`` or ``encode_if_smaller`` makes of data that cannot be changed, in an output of the
    promised size."""
    room = len(data) + FRAME_OVERHEAD_BYTES
    whole = np.full(room + 2 * _GUARD_BYTES, _GUARD, np.uint8)
    out = whole[_GUARD_BYTES : _GUARD_BYTES + room]
    size = encode(np.frombuffer(data, np.uint8), item_bytes, out)
    assert 0 <= size <= room, f"a frame of {size} bytes for {len(data)} of data"
    _check_guards(whole)
    return out[:size].tobytes()


def _encoded(codec: Codec, data: bytes, item_bytes: int) -> bytes:
    return _framed(codec.encode, data, item_bytes)


def _decoded(codec: Codec, frame: bytes, nbytes: int) -> bytes:
    """Decode into the middle of a larger array, and check that nothing beside it is touched."""
    whole = np.full(nbytes + 2 * _GUARD_BYTES, _GUARD, np.uint8)
    try:
        codec.decode(np.frombuffer(frame, np.uint8), whole[_GUARD_BYTES : _GUARD_BYTES + nbytes])
    finally:
        _check_guards(whole)
    return whole[_GUARD_BYTES : _GUARD_BYTES + nbytes].tobytes()


def _decoded_or_damaged(codec: Codec, frame: bytes, nbytes: int) -> None:
    """Decode bytes of any kind: only the typed error may leave the codec."""
    try:
        _decoded(codec, frame, nbytes)
    except CheckpointDamaged:
        return


def _check_refused(codec: Codec, frame: bytes, nbytes: int, what: str) -> None:
    try:
        _decoded(codec, frame, nbytes)
    except CheckpointDamaged:
        return
    pytest.fail(f"{what}: it was decoded into {nbytes} bytes")


def _check_guards(whole: Any) -> None:
    beside = np.concatenate([whole[:_GUARD_BYTES], whole[-_GUARD_BYTES:]])
    assert (beside == _GUARD).all(), "it wrote beside its output"


def _array_json(codec: Codec, count: int, item_bytes: int) -> dict[str, Any]:
    """Return the metadata of a zarr v3 array that is one chunk."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [count],
        "data_type": f"uint{8 * item_bytes}",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [count]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *codec.zarr(item_bytes)],
    }
