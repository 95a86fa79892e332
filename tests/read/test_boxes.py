"""Boxes: every run of a box's elements, and every part of a tensor, against numpy's slicing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt import CheckpointDamaged
from asyncckpt.read.boxes import TargetBox, flat_boxes, overlap_range, scatter_box, target_boxes
from asyncckpt.read.scatter import Window

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def _runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    begin = draw(st.integers(0, math.prod(shape)))
    return shape, begin, draw(st.integers(begin, math.prod(shape)))


@st.composite
def _boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    begins = [draw(st.integers(0, size - 1)) for size in shape]
    return tuple(begins), tuple(draw(st.integers(1, size - begin)) for size, begin in zip(shape, begins, strict=True))


def _slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))


@given(_runs())
def test_a_run_is_cut_into_boxes_that_tile_it_in_order(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, begin, end = run
    whole = np.arange(math.prod(shape)).reshape(shape)
    places = list(flat_boxes(shape, begin, end))
    assert len(places) <= max(1, 2 * len(shape) - 1)
    found = [whole[_slices(place.offsets, place.shape)].ravel() for place in places]
    assert [place.first for place in places] == [sum(map(len, found[:i])) for i in range(len(found))]
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(begin, end))


@given(st.data())
def test_bytes_of_a_box_reach_exactly_what_a_region_shares_with_it(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    whole = torch.arange(1, math.prod(shape) + 1, dtype=torch.int32).view(shape)
    (box_at, box), (live_at, live) = data.draw(_boxes(shape)), data.draw(_boxes(shape))
    stored = whole[_slices(box_at, box)].contiguous()
    region = TargetBox(torch.zeros(live, dtype=torch.int32), live_at)
    first, last = overlap_range(box_at, box, region)
    cut = data.draw(st.integers(first, last))
    flat = stored.view(-1)
    for begin, end in ((first, cut), (cut, last)):  # as extents bring it, in parts
        if begin < end:
            scatter_box(region, box_at, box, begin, flat[begin:end].view(torch.uint8), torch.int32)
    expected = torch.zeros_like(whole)
    expected[_slices(box_at, box)] = stored
    assert torch.equal(region.tensor, expected[_slices(live_at, live)])


@given(_runs(), st.booleans())
def test_a_window_is_the_same_elements_as_boxes(run: tuple[tuple[int, ...], int, int], flat: bool) -> None:
    shape, begin, end = run
    if not flat and shape:
        row = math.prod(shape[1:])
        begin, end = begin // row * row, end // row * row
    live = torch.zeros(end - begin, dtype=torch.int64)
    window = Window(live if flat or not shape or begin == end else live.view(-1, *shape[1:]), begin)
    whole = torch.arange(math.prod(shape)).view(shape)
    for region in target_boxes(window, shape):
        region.tensor.copy_(whole[_slices(region.offsets, tuple(region.tensor.shape))])
    assert live.tolist() == list(range(begin, end))


def test_half_an_element_is_damage() -> None:
    region = TargetBox(torch.zeros(4), (0,))
    with pytest.raises(CheckpointDamaged, match="middle of an element"):
        scatter_box(region, (0,), (4,), 0, torch.zeros(6, dtype=torch.uint8), torch.float32)
