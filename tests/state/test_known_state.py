"""A state that is known from the save before is captured exactly as one that nobody has seen."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.state_changes import CHANGES, described, drops_bias, model_of, new_optimizer, new_state, step
from torch import nn

from asyncckpt.errors import InvalidOption, UnsupportedValue
from asyncckpt.events import Event, EventBus, PlanRebuilt
from asyncckpt.state import known_tensors
from asyncckpt.state.capture import capture
from asyncckpt.state.known_states import KnownStates


def _found(make: Callable[[], Any]) -> Any:
    try:
        return described(make())
    except (UnsupportedValue, InvalidOption) as error:
        return str(error)


def _captured(known: KnownStates, state: dict[str, Any], number: int, captured: list[Any]) -> Any:
    captured.append(known.capture(state, number, weights_only=False))
    return captured[0].snapshot


@pytest.mark.parametrize("seed", range(24))
def test_a_known_state_is_captured_as_one_that_is_not(seed: int) -> None:
    rng, known, state = random.Random(seed), KnownStates(EventBus()), new_state()
    again = 0
    for number in range(60):
        if number % 15 == 0:  # a hook that stays would leave nothing to be known
            known, state = KnownStates(EventBus()), new_state()
            known.capture(state, number, weights_only=False)
        with contextlib.suppress(RuntimeError, ValueError, KeyError, AttributeError, TypeError):
            rng.choice(CHANGES)(state)
        for _ in range(rng.randrange(1, 4)):  # the second time it is known, unless nobody can vouch for it
            captured: list[Any] = []
            found = _found(functools.partial(_captured, known, state, number, captured))
            assert found == _found(functools.partial(capture, state, number))
            if captured and captured[0].again is not None:
                again += 1
                listed = captured[0].snapshot.pieces()
                pieces = captured[0].again.pieces
                assert [p.spec for p in pieces] == [p.spec for p in listed]
                assert [id(p.tensor) for p in pieces] == [id(p.tensor) for p in listed]
        if isinstance(found, str):  # most often a parameter that was replaced
            new_optimizer(torch.optim.AdamW)(state)
            step(state)
    assert again


def test_weights_alone_and_a_full_state_are_known_apart() -> None:
    state, known = new_state(), KnownStates(EventBus())
    step(state)
    for number in range(6):
        only = number % 2 == 1
        captured = known.capture(state, number, weights_only=only)
        assert described(captured.snapshot) == described(capture(state, number, weights_only=only))
        assert (captured.again is not None) == (number > 1)


def _said(change: Callable[[dict[str, Any]], Any]) -> list[tuple[str, str]]:
    """Return what is said of a state that changes between captures."""
    events: list[Event] = []
    bus = EventBus((events.append,))
    known, state = KnownStates(bus), new_state()
    step(state)
    for number in range(6):
        if number == 3:
            change(state)
        known.capture(state, number, weights_only=False)
    assert bus.notifier.drain(10)
    return [(one.component, one.reason) for one in events if isinstance(one, PlanRebuilt)]


def test_a_state_that_is_read_from_the_beginning_is_said_once() -> None:
    assert _said(lambda state: None) == []
    said = _said(lambda state: model_of(state).register_state_dict_post_hook(drops_bias))
    assert said == [("model", "hooks on its state_dict may change what that returns")]
    said = _said(lambda state: setattr(model_of(state).head.weight, "data", torch.zeros(16, 16)))
    assert said == [("", "tensors have another shape, dtype or place in memory, or were frozen")]


def test_what_is_known_keeps_no_tensor_alive() -> None:
    state, known = new_state(), KnownStates(EventBus())
    step(state)
    known.capture(state, 1, weights_only=False)
    assert known.capture(state, 2, weights_only=False).again is not None
    gone = [weakref.ref(one) for one in state["model"].parameters()]
    gone += [weakref.ref(one) for entry in state["optimizer"].state.values() for one in entry.values()]
    state.clear()
    gc.collect()
    assert not [one for one in gone if one() is not None]


def test_a_known_state_is_captured_without_an_object_for_each_tensor() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(500)))
    state: dict[str, Any] = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    step(state)
    known = KnownStates(EventBus())
    for number in range(3):
        known.capture(state, number, weights_only=False)
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        captured = known.capture(state, 4, weights_only=False)
        made = gc.get_count()[0] - before
    finally:
        gc.enable()
    assert captured.again is not None
    assert len(captured.again.pieces) == 4 * 1000
    assert made < 500


def test_a_state_that_is_saved_under_autocast_now_and_then_is_captured_alike() -> None:
    state, known = new_state(), KnownStates(EventBus())
    step(state)
    for number in range(6):
        with torch.autocast("cpu", enabled=number % 2 == 0):
            captured = known.capture(state, number, weights_only=False)
            assert described(captured.snapshot) == described(capture(state, number))


@pytest.mark.parametrize("make", [known_tensors._guards(), known_tensors._PythonForms])
def test_every_part_of_a_tensors_form_is_seen(make: Callable[..., Any]) -> None:
    forms = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(3, 2).t(),
        torch.zeros(1, 2, 3),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 3, requires_grad=True),
        nn.Parameter(torch.zeros(2, 3)),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.complex64).conj(),
        torch.zeros(2, 3, device="meta"),
    ]
    for at, one in enumerate(forms):
        assert [make(one).check(other) for other in forms] == [at == number for number in range(len(forms))]
