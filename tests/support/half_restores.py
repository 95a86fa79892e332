"""States in which one component fails to restore: of which kind, how, and at which place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asyncckpt import Replicated, RngState, Run

#: The bytes of the component's own file are damaged: every other failure is one of its own code.
DAMAGED = "damaged"

FAILURES: dict[str, Callable[[], BaseException]] = {
    "refuses": lambda: RuntimeError("The source state dict is empty"),
    "lacks": lambda: KeyError("scale"),
    "cannot read": lambda: OSError(5, "Input/output error"),
    "has no memory": lambda: MemoryError("none"),
    "is interrupted": KeyboardInterrupt,
}

_OWN = frozenset(FAILURES)
#: Kinds of the component that fails, and the ways in which it can.
KINDS: dict[str, frozenset[str]] = {
    "alone": _OWN | {DAMAGED},
    "marked": _OWN,
    "reaching": _OWN | {DAMAGED},
    "module": _OWN | {DAMAGED},
    "hooked": _OWN | {DAMAGED},
    "optimizer": _OWN | {DAMAGED},
    "tensor": frozenset({DAMAGED}),
    "plain": frozenset({DAMAGED}),
}


class Fault:
    """Raises when it is told to, half-way through loading."""

    def __init__(self) -> None:
        self._make: Callable[[], BaseException] | None = None

    def fail_with(self, make: Callable[[], BaseException]) -> None:
        self._make = make

    def strike(self) -> None:
        if self._make is not None:
            raise self._make()


class Refusing:
    """An object with a state of its own: it takes a number, and may then refuse the rest."""

    def __init__(self, number: int, holds: Any = None) -> None:
        self.fault = Fault()
        self.number = number
        self.values = torch.full((3000,), float(number))
        self.holds = holds

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        self.fault.strike()
        self.values = state["values"]


class _Marked(Replicated):
    @property
    def fault(self) -> Fault:
        found: Fault = self.value.fault
        return found


class _LoadsItself(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.fault = Fault()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.fault.strike()
        super()._load_from_state_dict(*args)


class _Hooked(nn.Linear):
    """Gives copies of its tensors, so that it has to take them back."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.fault = Fault()

    def state_dict(self, *args: Any, **more: Any) -> Any:
        found = super().state_dict(*args, **more)
        for key in list(found):
            found[key] = found[key].clone()
        return found

    def load_state_dict(self, state: Any, *args: Any, **more: Any) -> Any:
        self.fault.strike()
        return super().load_state_dict(state, *args, **more)


class _Optimizer(torch.optim.AdamW):
    def load_state_dict(self, state: Any) -> None:
        self.fault.strike()
        super().load_state_dict(state)


def _filled(value: Any, number: int) -> Any:
    with torch.no_grad():
        for tensor in (*value.parameters(), *value.buffers()):
            tensor.fill_(number)
    return value


def _stepped(kind: type[torch.optim.Optimizer], model: nn.Module, number: int) -> Any:
    optimizer = kind(model.parameters(), lr=0.1 * number)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(number))
    optimizer.step()
    _filled(model, number)
    return optimizer


def _odd(kind: str, number: int, model: nn.Module) -> Any:
    if kind == "alone":
        return Refusing(number)
    if kind == "marked":
        return _Marked(Refusing(number))
    if kind == "reaching":
        return Refusing(number, holds=[{"model": model}])
    if kind == "module":
        return _filled(_LoadsItself(), number)
    if kind == "hooked":
        return _filled(_Hooked(), number)
    if kind == "tensor":
        return torch.full((3000,), float(number))
    if kind == "plain":
        return {"number": number, "values": torch.full((3000,), float(number))}
    optimizer = _stepped(_Optimizer, model, number)
    optimizer.fault = Fault()
    return optimizer


def made_state(number: int, kind: str = "", place: int = 0) -> dict[str, Any]:
    """Return a state of every kind of component, of which all values go by ``number``; one more, ``odd``, of the given
    kind at that place."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    optimizer = _stepped(torch.optim.SGD if kind == "optimizer" else torch.optim.AdamW, model, number)
    torch.manual_seed(number)
    items: list[tuple[str, Any]] = [
        ("rng", RngState({"data": torch.Generator().manual_seed(number)})),
        ("counter", {"n": number}),
        ("model", model),
        ("optimizer", optimizer),
        ("schedule", torch.optim.lr_scheduler.StepLR(optimizer, number)),
        ("tensor", torch.full((3000,), number)),
    ]
    if kind:
        items.insert(place, ("odd", _odd(kind, number, model)))
    return dict(items)


def spoil(run: Run, component: str) -> bool:
    """Change the last byte of the component's tensors in the newest checkpoint; return whether it has any."""
    with run.open() as checkpoint:
        tensors = checkpoint.manifest.components[component].tensors.values()
        record = max((one for one in tensors if one.nbytes), key=lambda one: (one.file, one.end), default=None)
        if record is None:
            return False
        file = Path(checkpoint.path) / record.file
        end = record.end
    data = bytearray(file.read_bytes())
    data[end - 1] ^= 4
    file.write_bytes(bytes(data))
    return True
