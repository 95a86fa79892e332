"""The chunk-level codec benchmark: contenders that lose bits are caught, and the winner is the one the bar means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt.codecs.blosc import Array
from benchmarks.harness.figures import Spread
from benchmarks.suites.codecs.bars import standing
from benchmarks.suites.codecs.contenders import contenders, one_core
from benchmarks.suites.codecs.groups import CHUNK_BYTES, Group, group
from benchmarks.suites.codecs.measure import Measured, lossless, measure_group


def _weights(dtype: torch.dtype) -> Group:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(1)) / 50
    return group("weights", "late", [values.to(dtype), torch.ones(8, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_is_lossless_and_measured(dtype: torch.dtype) -> None:
    weights = _weights(dtype)
    with one_core():
        running, _ = contenders(weights.item_bytes)
        found = measure_group(weights, running, rounds=1)
    assert {one.label for one in found.measured} >= {"planes", "lz4", "zstd", "blosc", "numcodecs zstd 1"}
    assert 1.1 < found.of("planes").ratio <= found.bound


class _Lossy:
    label = "lossy"

    def prepare(self, chunk: Array) -> Array:
        return chunk

    def encode(self, prepared: Array) -> Any:
        return prepared & 0xFE

    def decode(self, frame: bytes, out: Array) -> Any:
        return frame


class _Spoiling(_Lossy):
    label = "spoiling"

    def encode(self, prepared: Array) -> Any:
        frame = prepared.tobytes()
        prepared[0] ^= 1
        return frame


@pytest.mark.parametrize(("contender", "says"), [(_Lossy(), "not lossless"), (_Spoiling(), "changes the data")])
def test_a_contender_that_loses_or_spoils_data_is_not_timed(contender: _Lossy, says: str) -> None:
    chunk = np.arange(256, dtype=np.uint8)
    with pytest.raises(ValueError, match=says):
        lossless(contender, [chunk], [np.empty_like(chunk)])


def test_small_tensors_are_left_out_and_large_ones_cut() -> None:
    large = torch.zeros(CHUNK_BYTES // 4 + 1)
    found = group("any", "late", [torch.zeros(10), large])
    assert [[chunk.nbytes for chunk in tensor] for tensor in found.tensors] == [[CHUNK_BYTES, 4]]


def test_the_bound_counts_noise_whole_and_constants_as_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)
    items = np.stack([noise, np.zeros_like(noise)], axis=1).reshape(-1)
    assert Group("any", "late", 2, [[items]]).bound == 2.0


def _measured(label: str, ratio: float, speed: float) -> Measured:
    rate = Spread(speed, speed, speed, 1)
    return Measured(label, ratio, rate, rate)


@pytest.mark.parametrize(
    ("others", "met", "winner"),
    [
        ([("far", 1.17, 900.0)], True, "planes"),
        ([("near", 1.19, 500.0)], True, "planes"),
        ([("near", 1.19, 501.0)], False, "planes"),
        ([("better", 1.21, 100.0)], False, "planes"),
        ([("better", 1.21, 1001.0)], False, "better"),
        ([("far better", 1.3, 100.0)], False, "far better"),
    ],
)
def test_the_bar_asks_for_the_best_ratio_and_twice_the_speed_of_its_like(
    others: list[tuple[str, float, float]], met: bool, winner: str
) -> None:
    measured = [_measured("planes", 1.2, 1000.0), *(_measured(*other) for other in others)]
    found, text = standing(measured)
    assert found is met
    assert text.startswith(f"{winner} is the fastest within 2 % of the best ratio")
