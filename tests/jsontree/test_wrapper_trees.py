"""Trees of tensors that wrap others: what is encoded of them, and what is damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.json_trees import round_trip
from torch.testing._internal.two_tensor import TwoTensor

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue


def tree(**fields: Any) -> dict[str, Any]:
    inside = {"a": {"$": "tensor", "v": "x.a"}, "b": {"$": "tensor", "v": "x.b"}}
    whole = {"$": "wrapper", "class": "m.C", "size": [3], "dtype": "float32", "context": None, "v": inside}
    return {**whole, **fields}


def decoded(node: Any) -> Any:
    return jsontree.decode(node, lambda name: torch.zeros(1))


def test_a_wrapper_is_its_parts_and_its_context() -> None:
    value = {"x": [TwoTensor(torch.ones(3), TwoTensor(torch.zeros(3), torch.full((3,), 2.0)))]}
    tensors: dict[str, torch.Tensor] = {}
    node: Any = jsontree.encode(value, "", tensors.__setitem__)
    assert list(tensors) == ["x.0.a", "x.0.b.a", "x.0.b.b"]
    assert jsontree.tensor_names(node) == list(tensors)
    assert node["x"][0]["class"].endswith("two_tensor.TwoTensor")
    found = round_trip(value)["x"][0]
    assert (found["shape"], found["dtype"], found["context"]) == ((3,), torch.float32, None)
    assert torch.equal(found["tensors"]["b"]["tensors"]["b"], torch.full((3,), 2.0))
    assert jsontree.version_of(jsontree.dumps(node)) == 4
    assert jsontree.needs_live(node)


def test_a_wrapper_in_a_set_is_refused() -> None:
    with pytest.raises(UnsupportedValue, match="set"):
        jsontree.encode({TwoTensor(torch.ones(3), torch.ones(3))}, "", lambda *_: None)


def test_a_class_that_fails_to_give_its_parts_is_refused_by_path() -> None:
    class Broken(TwoTensor):
        def __tensor_flatten__(self) -> Any:
            raise NotImplementedError("later")

    with pytest.raises(UnsupportedValue, match=r"\['x'\].*does not give its parts.*later"):
        jsontree.encode({"x": Broken(torch.ones(3), torch.ones(3))}, "", lambda *_: None)


@pytest.mark.parametrize(
    "node",
    [
        tree(v=[]),
        tree(v={"a": 1}),
        tree(v={"a": {"b": {"$": "tensor", "v": "x"}}}),
        tree(v={"a": {"$": "tensor", "v": 5}}),
        tree(v={"a": {"$": "list", "v": []}}),
        tree(size="ab"),
        tree(size=[-1]),
        tree(size=[True]),
        tree(size=[2**63]),
        tree(dtype=["float32"]),
        tree(dtype="load"),
        tree(context={"$": "os.system", "v": "true"}),
        tree(**{"class": 5}),
        tree(more=1),
        {key: value for key, value in tree().items() if key != "context"},
    ],
)
def test_a_hostile_wrapper_is_damage(node: Any) -> None:
    assert decoded(tree())["class"] == "m.C"
    with pytest.raises(CheckpointDamaged):
        decoded(node)


def test_wrappers_nested_too_deep_are_damage_before_the_stack_ends() -> None:
    node: Any = {"$": "tensor", "v": "x"}
    for _ in range(2000):
        node = tree(v={"a": node})
    with pytest.raises(CheckpointDamaged, match="deep"):
        decoded(node)
