"""Plain data that Lightning has beside the model and the optimizers are components of a checkpoint, too."""

from __future__ import annotations

from typing import Any

import torch


class TrainerPart:
    """Has such data in ``value``: a dictionary, or None until a restore has put one there."""

    def __init__(self, value: dict[str, Any] | None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Return the data."""
        return self.value or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the data of a checkpoint."""
        self.value = state


def is_equal(one: Any, other: Any) -> bool:
    """Return whether two trees of plain data and tensors have the same values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return bool(one.keys() == other.keys()) and all(is_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other)
