"""Bytes of tensors of any layout reach their place, whatever way extents cut them; and come back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from asyncckpt.memory.arena import Arena
from asyncckpt.read.scatter import scatter
from asyncckpt.stage.copy import copy_segments
from asyncckpt.types import Segment


def _variants(base: torch.Tensor) -> list[torch.Tensor]:
    """The same kind of values in memory layouts a training state can have."""
    out = [base, base[::2], base.flip(0)[:0]]
    if base.dim() >= 2:
        out += [base.transpose(0, 1), base[:, 1:], base[:1].expand(3, *base.shape[1:])]
    if base.dim() == 4:
        out.append(base.to(memory_format=torch.channels_last))
    return out


SHAPES = [(), (0,), (7,), (5, 3), (2, 3, 4), (2, 3, 4, 5), (1, 1), (3, 0, 2)]


def _reference(tensor: torch.Tensor) -> bytes:
    return b"".join(one.clone().reshape(1).view(torch.uint8).numpy().tobytes() for one in tensor.detach().reshape(-1))


@examples(150)
@given(data=st.data())
def test_any_layout_cut_anywhere_arrives_as_row_major_bytes(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]))
    base = torch.arange(1, 1 + max(1, torch.Size(shape := data.draw(st.sampled_from(SHAPES))).numel()))
    base = base[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    variants = _variants(base) if base.dim() else [base]
    if dtype == torch.complex64:
        variants.append(base.conj())
    tensor = data.draw(st.sampled_from(variants))
    expected = _reference(tensor.resolve_conj())
    count, item = tensor.numel(), dtype.itemsize
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
    arena = Arena()
    arena.grow(1 << 16)
    slot = arena.acquire(1 << 16)
    segments = [Segment(0, a * item, 64 + a * item, (b - a) * item) for a, b in itertools.pairwise(cuts)]
    copy_segments([tensor], segments, slot)
    assert bytes(slot.view[64 : 64 + len(expected)]) == expected

    back = torch.zeros_like(tensor.resolve_conj()) if not tensor.is_conj() else torch.zeros(tensor.shape, dtype=dtype)
    if 0 in tensor.stride() and count:
        back = torch.zeros(tensor.shape, dtype=dtype)
    for a, b in itertools.pairwise(cuts):
        raw = torch.frombuffer(bytearray(expected[a * item : b * item]) or bytearray(1), dtype=torch.uint8)
        if b > a:
            scatter(back, a * item, raw, dtype)
    assert _reference(back) == expected


def test_many_small_tensors_are_copied_in_batches_without_mixing_them_up() -> None:
    tensors = [torch.full((n % 50,), float(n)) for n in range(300)]
    arena = Arena()
    arena.grow(1 << 20)
    slot = arena.acquire(1 << 20)
    segments, position = [], 0
    for index, tensor in enumerate(tensors):
        if index % 7 == 0:
            position += 4  # a gap: what lies between must not be touched
        segments.append(Segment(index, 0, position, tensor.nbytes))
        position += tensor.nbytes
    slot.view[:position] = b"\xee" * position
    copy_segments(tensors, segments, slot)
    covered = set()
    for segment in segments:
        span = slice(segment.extent_offset, segment.extent_offset + segment.nbytes)
        assert bytes(slot.view[span]) == _reference(tensors[segment.piece])
        covered.update(range(span.start, span.stop))
    assert all(slot.view[i] == 0xEE for i in range(position) if i not in covered)


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float16, torch.float64])
def test_restoring_converts_floats_on_the_way(live: torch.dtype) -> None:
    source = torch.randn(6, 5)
    target = torch.zeros(5, 6, dtype=live).t()
    raw = source.reshape(-1).view(torch.uint8)
    scatter(target, 0, raw[:40], torch.float32)
    scatter(target, 40, raw[40:], torch.float32)
    assert torch.equal(target, source.to(live))
