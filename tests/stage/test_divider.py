"""Whoever divides snapshots builds on the one before, and decides exactly what somebody without a memory decides."""

from __future__ import annotations

import random

import pytest
import torch

from asyncckpt.stage.eager import Divider, Division, OwnedMemory, OwnedRanges
from asyncckpt.types import LocalTensor, TensorSpec

_LARGE = 1 << 10  # items


class _Memory:
    """Tensors that lie beside each other in few memory blocks, which somebody changes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.block = torch.zeros(8 * _LARGE)
        self.tensors = [self.block[index * _LARGE : (index + 1) * _LARGE] for index in range(4)]
        self.tensors += [torch.zeros(_LARGE) for _ in range(4)]
        self.owned = set(range(len(self.tensors)))
        self.frozen: set[int] = set()
        self.private: set[int] = set()
        self.earned: frozenset[int] = frozenset(range(len(self.tensors)))
        self.ranges: OwnedRanges | None = None

    def change(self) -> None:
        index = self.rng.randrange(len(self.tensors))
        tensor = self.tensors[index]
        kind = self.rng.randrange(11)
        if kind == 0:
            tensor.data = tensor.data.clone()
        elif kind == 1:
            tensor.data = self.block[4 * _LARGE : 5 * _LARGE]
        elif kind == 2:  # in the gaps lies what is somebody else's
            tensor.data = self.block[::8]
        elif kind == 3:
            tensor.data = torch.zeros(_LARGE // 64, 64).t()
        elif kind == 4:  # the block that a tensor begins in grows, over what was another one's
            self.tensors[index] = self.block[: self.rng.choice([_LARGE, 5 * _LARGE])]
        elif kind == 5:
            self.owned ^= {index}
        elif kind == 6:
            self.frozen ^= {index}
        elif kind == 7:
            self.private ^= {index}
        elif kind == 8:
            self.earned = frozenset(self.earned ^ {index})
        elif kind == 9:
            self.tensors[index] = torch.zeros(0)

    def divided(self, divider: Divider, *, anew: bool) -> Division:
        owned = OwnedMemory(None if anew else self.ranges)
        owned.add([one for index, one in enumerate(self.tensors) if index in self.owned])
        if not anew:
            self.ranges = owned.ranges
        pieces = [
            LocalTensor(
                TensorSpec(str(index), "F32", tuple(one.shape), 4 * one.numel(), index in self.frozen),
                one.detach(),
                private=index in self.private,
            )
            for index, one in enumerate(self.tensors)
        ]
        return divider.divide(pieces, owned, self.earned)


@pytest.mark.parametrize("seed", range(10))
def test_a_divider_decides_what_one_without_a_memory_decides(seed: int) -> None:
    memory, divider = _Memory(seed), Divider()
    for _ in range(120):
        memory.change()
        found, fresh = memory.divided(divider, anew=False), memory.divided(Divider(), anew=True)
        assert (found.eager, found.deferred, found.checked) == (fresh.eager, fresh.deferred, fresh.checked)
        assert (found.addresses, list(found.on_trial)) == (fresh.addresses, list(fresh.on_trial))


def test_a_buffer_whose_memory_block_has_become_a_larger_one_takes_along_what_lies_in_it() -> None:
    """Where a buffer begins and how large it is say nothing about the block that it lies in."""
    block, divider, spec = torch.zeros(2 * _LARGE), Divider(), TensorSpec("x", "F32", (_LARGE,), 4 * _LARGE)
    weight, owned = block[_LARGE:], OwnedMemory()
    owned.add([weight])
    of_its_own = torch.zeros(0).set_(block.untyped_storage()[: 4 * _LARGE], 0, (_LARGE,))
    assert of_its_own.data_ptr() == block.data_ptr()
    for buffer, expected in ((of_its_own, [1]), (block[:_LARGE], []), (of_its_own, [1])):
        assert divider.divide([LocalTensor(spec, buffer), LocalTensor(spec, weight)], owned).deferred == expected
