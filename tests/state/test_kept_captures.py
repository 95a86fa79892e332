"""A capture that builds on the one before finds exactly what one without finds, whatever has changed in between."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from support.state_changes import CHANGES, described, entry_of, new_optimizer, new_state, step
from torch import nn

from asyncckpt.errors import UnsupportedValue
from asyncckpt.state.capture import capture
from asyncckpt.state.kept import KeptCaptures


@pytest.mark.parametrize("seed", range(12))
def test_a_capture_that_builds_on_the_one_before_finds_what_one_without_finds(seed: int) -> None:
    rng, kept, state = random.Random(seed), KeptCaptures(), new_state()
    for number in range(60):
        change = rng.choice(CHANGES)
        try:
            change(state)
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
            continue  # a step over state that an earlier change has made useless
        found: list[Any] = []
        for known in (kept, None):
            try:
                found.append(described(capture(state, number, kept=known)))
            except UnsupportedValue as error:
                found.append(str(error))
        assert found[0] == found[1]
        if isinstance(found[0], str):  # most often a parameter that was replaced
            new_optimizer(torch.optim.AdamW)(state)
            step(state)


def test_a_state_that_stays_is_recognised_and_keeps_its_tree() -> None:
    state, kept = new_state(), KeptCaptures()
    step(state)
    first = capture(state, 1, kept=kept).components[1]
    step(state)
    second = capture(state, 2, kept=kept).components[1]
    assert isinstance(first.tree, dict)
    assert isinstance(second.tree, dict)
    assert second.tree["state"] is first.tree["state"]
    assert [id(one.spec) for one in second.pieces] == [id(one.spec) for one in first.pieces]


def test_what_is_kept_keeps_no_tensor_alive() -> None:
    state, kept = new_state(), KeptCaptures()
    step(state)
    capture(state, 1, kept=kept)
    capture(state, 2, kept=kept)
    gone = [weakref.ref(one) for one in state["model"].parameters()]
    gone += [weakref.ref(one) for entry in state["optimizer"].state.values() for one in entry.values()]
    state.clear()
    gc.collect()
    assert not [one for one in gone if one() is not None]


def test_a_sparse_tensor_that_takes_the_place_of_a_plain_one_is_refused() -> None:
    state, kept = new_state(), KeptCaptures()
    step(state)
    capture(state, 1, kept=kept)
    entry = entry_of(state)
    entry["exp_avg"] = torch.zeros(entry["exp_avg"].shape).to_sparse()
    with pytest.raises(UnsupportedValue, match="exp_avg"):
        capture(state, 2, kept=kept)


def test_a_tensor_that_moves_to_another_parameters_state_is_seen() -> None:
    weights = nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    state: dict[str, Any] = {"model": weights, "optimizer": torch.optim.SGD(weights.parameters())}
    kept, (first, second) = KeptCaptures(), weights
    entries = state["optimizer"].state
    entries[first], entries[second] = {"a": torch.zeros(2), "b": torch.zeros(2)}, {"c": torch.zeros(2)}
    capture(state, 1, kept=kept)
    entries[second] = {"b": entries[first].pop("b"), **entries[second]}
    assert described(capture(state, 2, kept=kept)) == described(capture(state, 2))
