"""Values on their way through a json tree and back."""

from __future__ import annotations

from typing import Any

import torch

from asyncckpt import jsontree

LARGE = 20_000  # float64 elements: over 64 KiB


def round_trip(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    tree = jsontree.encode(value, "", tensors.__setitem__, "part")
    assert jsontree.tensor_names(tree) == list(tensors)
    return jsontree.decode(jsontree.loads(jsontree.dumps(tree), "state.json"), tensors.__getitem__)


def through_live(value: Any, live: Any) -> tuple[Any, jsontree.Live]:
    """What comes back where ``live`` lives, and what is noted of it."""
    tensors: dict[str, torch.Tensor] = {}
    tree = jsontree.encode(value, "", tensors.__setitem__, "part")
    assert jsontree.tensor_names(tree) == list(tensors)
    noted = jsontree.Live(live)
    read = jsontree.loads(jsontree.dumps(tree), "state.json")
    return jsontree.decode(read, tensors.__getitem__, live=noted), noted
