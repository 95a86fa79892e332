"""What cannot be stored is refused by its path, with the way out."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest
import torch
from support.json_trees import LARGE, round_trip

from asyncckpt import jsontree
from asyncckpt.errors import UnsupportedValue


def refused(value: Any) -> str:
    with pytest.raises(UnsupportedValue) as caught:
        jsontree.encode(value, "", lambda name, tensor: None, "optimizer")
    return str(caught.value)


T = torch.zeros(1)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        len,
        lambda: 0,
        json,
        int,
        np.longdouble(1),
        np.array([object()]),
        np.ma.masked_array([1]),
        collections.defaultdict(lambda: 0),
        ...,
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unsupported_value_is_refused_naming_its_path_and_the_way_out(value: Any) -> None:
    message = refused({"param_groups": [{"foo": value}]})
    assert message.startswith("state['optimizer']['param_groups'][0]['foo']: ")
    assert type(value).__name__ in message
    assert "state_dict" in message


def test_an_unsupported_key_or_member_is_refused_naming_its_path() -> None:
    assert "state['optimizer']['a'][<key 1>]" in refused({"a": {1: 0, len: 0}})
    assert "state['optimizer'][7]['x']" in refused({7: {"x": object()}})
    assert "in a set has no stable name" in refused({"a": {T}})


def test_a_cycle_is_refused() -> None:
    loop: dict[str, Any] = {"a": []}
    loop["a"].append(loop)
    assert "state['optimizer']['a'][0]: a value of type dict contains itself" in refused(loop)


def test_an_object_reached_twice_is_no_cycle() -> None:
    shared = [1]
    assert round_trip([shared, shared, {"a": shared}]) == [[1], [1], {"a": [1]}]


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}, lambda v: collections.defaultdict(int, a=v)],
)
def test_depth_is_limited_before_the_stack_is_and_what_encodes_loads(wrap: Any) -> None:
    value: Any = np.zeros(LARGE)
    for _ in range(200):
        value = wrap(value)
    encoded = round_trip(value)
    assert type(encoded) is type(value)
    assert "over 200 deep" in refused(wrap(value))
