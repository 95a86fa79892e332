"""A model and an optimizer that hold tensors of subclasses and objects of their own classes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Self

import torch
from torch import nn


class _Wrapping(torch.Tensor):
    """Wraps tensors that it keeps as attributes, and has a context of plain values."""

    parts: tuple[str, ...] = ()
    how: tuple[str, int]

    @classmethod
    def of(cls, how: tuple[str, int], *tensors: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, tensors[0].shape, dtype=torch.float32)
        made.how = how
        for name, tensor in zip(cls.parts, tensors, strict=True):
            setattr(made, name, tensor)
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.parts), {"how": self.how, "as": torch.bfloat16}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Self:
        return cls.of(context["how"], *(inner[name] for name in cls.parts))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] not in ("detach", "alias"):
            raise NotImplementedError(func)
        return cls.of(args[0].how, *(getattr(args[0], name) for name in cls.parts))


class Packed(_Wrapping):
    """A quantised tensor."""

    parts = ("codes", "scale")


class Pair(_Wrapping):
    """Two tensors, which may wrap others."""

    parts = ("first", "second")


@dataclasses.dataclass
class Meter:
    """A dataclass in an optimizer's state."""

    count: int
    seen: tuple[float, ...]


class Phase(enum.Enum):
    """An enum in an optimizer's state."""

    WARM = "warm"
    MAIN = "main"


class Gauge:
    """An object with a state of its own in an optimizer's state."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]

    def __repr__(self) -> str:
        return f"Gauge({self.value.hex()})"


class Keeping(torch.optim.SGD):
    """An optimizer that keeps all of these beside its parameters; its module names their classes."""


def packed(codes: torch.Tensor, scale: torch.Tensor) -> Packed:
    return Packed.of(("rows", 4), codes, scale)


class Quantised(nn.Module):
    """A layer whose weight is quantised, and one that is trained."""

    def __init__(self, weight: Packed, trained: torch.Tensor) -> None:
        super().__init__()
        self.fixed = nn.Parameter(weight, requires_grad=False)
        self.trained = nn.Parameter(trained)
