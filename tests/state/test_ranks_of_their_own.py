"""What a process holds for one rank of a job: names that only a rank's component has, and generators of a device."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, InvalidOption, RngState


@pytest.mark.parametrize("name", ["rng+1", "loader+12", "a+b+0"])
def test_a_name_that_another_ranks_component_would_have_is_refused(name: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        with pytest.raises(InvalidOption, match=r"ends like those that the ranks of a job get"):
            run.save(1, {name: {"a": 1}})
        run.save(1, {name.replace("+", "_"): {"a": 1}, "a+b": 1, "+1x"[1:]: 2}).result()


def _generators(seed: int) -> dict[str, Any]:
    return {
        "python": random.Random(seed),
        "numpy": np.random.default_rng(seed),
        "old": np.random.Generator(np.random.MT19937(seed)),
        "torch": torch.Generator().manual_seed(seed),
    }


def _draw(rng: RngState) -> dict[str, float]:
    own = rng.generators
    return {
        "python": own["python"].random(),
        "numpy": own["numpy"].random(),
        "old": own["old"].random(),
        "torch": torch.rand(1, generator=own["torch"]).item(),
        "global": torch.rand(1).item(),
        "global python": random.random(),
        "global numpy": float(np.random.rand()),
    }


def _saved(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return RngState(_generators(seed)).state_dict()


def test_derived_streams_differ_by_rank_and_come_back() -> None:
    states = [_saved(0), _saved(1)]
    seen: dict[int, dict[str, float]] = {}
    for rank in (2, 3, 4, 2):
        rng = RngState(_generators(99 + rank))
        rng.load_derived(states, rank)
        drawn = _draw(rng)
        assert seen.setdefault(rank, drawn) == drawn, "the same checkpoint gives the same rank another stream"
    for rank in (0, 1):
        rng = RngState(_generators(0))
        rng.load_state_dict(states[rank])
        seen[rank] = _draw(rng)
    for name in seen[2]:
        assert len({drawn[name] for drawn in seen.values()}) == 5, f"two ranks share {name}"
    other = RngState(_generators(0))
    other.load_derived([_saved(7), _saved(1)], 2)
    assert not set(_draw(other).values()) & set(seen[2].values()), "another run has the same streams"


def test_a_generator_that_all_ranks_shared_stays_shared_and_one_ranks_is_not_taken() -> None:
    rng = RngState(_generators(5))
    rng.load_derived([_saved(3), _saved(3)], 2)
    shared = _draw(rng)
    rng.load_state_dict(_saved(3))
    assert _draw(rng) == shared
    rng.load_derived([_saved(3)], 1)
    assert not set(_draw(rng).values()) & set(shared.values())


class _Devices:
    """Stands in for CUDA devices, and for what torch knows of their generators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, current: int, ranks: int) -> None:
        self.states = [torch.full((4,), 10 * device, dtype=torch.uint8) for device in range(count)]
        self.current, self.ranks = current, ranks
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.states[device])
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: self.states)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)
        monkeypatch.setattr("asyncckpt.state.rng.job_size", lambda: self.ranks)

    def _set(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state

    def values(self) -> list[int]:
        return [int(state[0]) for state in self.states]


def test_a_cuda_generator_belongs_to_the_rank_whatever_its_device_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    _Devices(monkeypatch, 4, 3, ranks=4)
    saved = RngState().state_dict()
    for count, current, expected in ((1, 0, [30]), (4, 1, [0, 30, 20, 30])):
        devices = _Devices(monkeypatch, count, current, ranks=4)
        RngState().load_state_dict(saved)
        assert devices.values() == expected


def test_a_process_alone_keeps_the_generators_of_all_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    _Devices(monkeypatch, 3, 1, ranks=1)
    saved = RngState().state_dict()
    for current, expected in ((1, [0, 10, 20]), (0, [10, 0, 20]), (2, [0, 20, 10])):
        devices = _Devices(monkeypatch, 3, current, ranks=1)
        devices.states = [torch.full((4,), 99, dtype=torch.uint8)] * 3
        RngState().load_state_dict(saved)
        assert devices.values() == expected, current
    # as a rank of a job, it has one device
    devices = _Devices(monkeypatch, 2, 1, ranks=2)
    RngState().load_state_dict(saved)
    assert devices.values() == [0, 10]
    # a checkpoint that is older lists devices by their numbers
    devices = _Devices(monkeypatch, 2, 1, ranks=1)
    RngState().load_state_dict({**saved, "cuda": [bytes([7] * 4), bytes([8] * 4), bytes([9] * 4)]})
    assert devices.values() == [7, 8]


def test_a_checkpoint_that_has_such_a_name_already_can_still_be_restored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import re

    with monkeypatch.context() as patch, Checkpointer(tmp_path / "run") as run:
        patch.setattr("asyncckpt.state.capture._OF_A_RANK", re.compile("(?!)"))
        run.save(1, {"rng+1": {"a": 1}}).result()
    state = {"rng+1": {"a": 0}}
    asyncckpt.Run(tmp_path / "run").restore(state)
    assert state == {"rng+1": {"a": 1}}
