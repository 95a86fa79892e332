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
