"""The layout: a pure function that covers every byte exactly once, wherever extents cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from asyncckpt import formats
from asyncckpt.codecs import codecs
from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.errors import InvalidOption
from asyncckpt.plan.layout import LayoutCache, plan
from asyncckpt.types import Layout, LayoutOptions, TensorSpec

FORMAT = formats.get("safetensors")
NONE = codecs.get("none")


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= size
    return TensorSpec(name, dtype, shape, nbytes)


specs = st.lists(
    st.builds(
        _spec,
        st.text(min_size=1, max_size=4),
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    max_size=12,
    unique_by=lambda spec: spec.name,
)


@examples(200)
@given(one=specs, two=specs, shard_bytes=st.integers(1, 60_000), extents=st.integers(1, 4))
def test_every_byte_is_covered_once(
    one: list[TensorSpec], two: list[TensorSpec], shard_bytes: int, extents: int
) -> None:
    options = LayoutOptions(shard_bytes=shard_bytes, extent_bytes=4096 * extents)
    layout = plan((("a", tuple(one)), ("b", tuple(two))), FORMAT, NONE, options)
    everything = [*one, *two]
    covered = [0] * len(everything)
    for shard in layout.shards:
        position = 0
        for extent in shard.extents:
            assert extent.offset == position
            assert extent.offset % (4096 * extents) == 0
            position += extent.nbytes
            inside = len(extent.header)
            for segment in extent.segments:
                assert segment.extent_offset == inside, "a hole, or two tensors on one another"
                assert segment.source_offset == covered[segment.piece], "out of order"
                covered[segment.piece] += segment.nbytes
                inside += segment.nbytes
            assert inside == extent.nbytes
        assert position == shard.nbytes
        assert (
            sum(p.spec.nbytes for p in shard.placements) <= shard_bytes
            or sum(1 for p in shard.placements if p.spec.nbytes) == 1
        )
        assert all(placement.begin % ITEM_BYTES[placement.spec.dtype] == 0 for placement in shard.placements)
    assert covered == [spec.nbytes for spec in everything]


def _files(layout: Layout) -> list[tuple[str, int, list[tuple[str, int]]]]:
    return [(s.file, s.nbytes, [(p.spec.name, p.begin) for p in s.placements]) for s in layout.shards]


@given(one=specs, seed=st.integers())
def test_the_order_a_dict_was_built_in_does_not_matter(one: list[TensorSpec], seed: int) -> None:
    shuffled = one.copy()
    random.Random(seed).shuffle(shuffled)
    options = LayoutOptions(shard_bytes=500)
    assert _files(plan((("a", tuple(one)),), FORMAT, NONE, options)) == _files(
        plan((("a", tuple(shuffled)),), FORMAT, NONE, options)
    )


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    big, small = _spec("big", "U8", (10_000,)), _spec("a", "U8", (10,))
    layout = plan((("m", (small, big)),), FORMAT, NONE, LayoutOptions(shard_bytes=100))
    assert [s.file for s in layout.shards] == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]


def test_a_component_without_tensors_has_no_shard() -> None:
    assert plan((("rng", ()),), FORMAT, NONE, LayoutOptions()).shards == ()


def test_the_cache_returns_the_same_plan_and_notices_a_change() -> None:
    cache = LayoutCache(FORMAT, NONE, LayoutOptions())
    first = (("a", (_spec("x", "F32", (3,)),)),)
    same = (("a", (_spec("x", "F32", (3,)),)),)
    other = (("a", (_spec("x", "F32", (4,)),)),)
    assert cache.get(first) is cache.get(same)
    assert cache.get(other) is not cache.get(first)
    assert cache.get(other).fingerprint != cache.get(first).fingerprint


@pytest.mark.parametrize("options", [{"extent_bytes": 0}, {"extent_bytes": 5000}, {"shard_bytes": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InvalidOption):
        LayoutOptions(**options)
