"""Small trainings of many kinds: modules, optimizers, dtypes, memory formats, and what loops do between two steps.

Every one is deterministic: two of the same recipe that take the same steps hold the same bits, so a training that was
resumed can be compared with one that was not broken.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

#: What a batch looks like, whatever the module: (samples, channels, height, width), and the classes to tell apart.
_SAMPLES, _CHANNELS, _EDGE, _CLASSES = 4, 3, 12, 5


class _Flat(nn.Module):
    """Two layers, and a third that shares the memory of the first."""

    def __init__(self) -> None:
        super().__init__()
        width = _CHANNELS * _EDGE * _EDGE
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, _CLASSES)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1)
        return self.second(torch.tanh(self.tied(torch.tanh(self.first(rows)))))


class _Convolutions(nn.Module):
    """Convolutions with batch statistics, which change in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(_CHANNELS, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 192, 3, stride=4)
        )
        self.head = nn.LazyLinear(_CLASSES)
        self.head(torch.zeros(1, 192 * 9))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(images).flatten(1))


class _Embedded(nn.Module):
    """An embedding that rescales its rows in the forward pass, a recurrent layer, and a frozen projection."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(32, 64, max_norm=1.0)
        self.recurrent = nn.LSTM(64, 128, batch_first=True)
        self.frozen = nn.Linear(128, 128).requires_grad_(False)
        self.head = nn.Linear(128, _CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = (images.flatten(1).float() * 7).long().remainder(32)[:, :20]
        hidden, _ = self.recurrent(self.rows(tokens))
        return self.head(self.frozen(hidden[:, -1]))


class _Counting(nn.Module):
    """A module with state that is no tensor, an expanded buffer, and a buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Flat()
        self.calls = 0
        self.register_buffer("scale", torch.ones(1).expand(_CLASSES))
        self.register_buffer("history", torch.zeros(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.body(images) * self.scale
        self.history = torch.cat([self.history, out.detach().float().mean().reshape(1)])
        return out + 0.001 * self.calls

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}history")
        if stored is not None and stored.shape != self.history.shape:
            self.history = torch.zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _normed() -> nn.Module:
    model = _Flat()
    parametrizations.weight_norm(model.second)
    return model


MODULES: Mapping[str, Callable[[], nn.Module]] = {
    "flat": _Flat,
    "convolutions": _Convolutions,
    "embedded": _Embedded,
    "counting": _Counting,
    "weight-norm": _normed,
}

#: Optimizers of torch, with what makes each keep the most state.
OPTIMIZERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 1e-3, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 1e-3}),
    "adamw-fused": ("AdamW", {"lr": 1e-3, "fused": True}),
    "adamw-foreach": ("AdamW", {"lr": 1e-3, "foreach": True, "amsgrad": True}),
    "adamax": ("Adamax", {"lr": 1e-3}),
    "nadam": ("NAdam", {"lr": 1e-3}),
    "radam": ("RAdam", {"lr": 1e-3}),
    "rmsprop": ("RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.9}),
    "rprop": ("Rprop", {"lr": 1e-3}),
    "adagrad": ("Adagrad", {"lr": 1e-2}),
    "adadelta": ("Adadelta", {"lr": 0.5}),
    "asgd": ("ASGD", {"lr": 1e-2}),
    "adafactor": ("Adafactor", {"lr": 1e-2}),
    "lbfgs": ("LBFGS", {"lr": 0.1, "history_size": 3, "max_iter": 2}),
}
#: They have no step for bf16 parameters on the CPU that runs twice alike, or none at all.
_FP32_ONLY = frozenset({"lbfgs"})

DTYPES = ("fp32", "bf16", "bf16-fp32-state")
FORMATS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels-last": torch.channels_last,
}


class Training:
    """One training: a model, its optimizer, a schedule, and an average of the weights."""

    def __init__(self, recipe: Recipe, init: int) -> None:
        torch.manual_seed(init)
        self.recipe = recipe
        model = MODULES[recipe.module]()
        if recipe.dtype != "fp32":
            model = model.to(torch.bfloat16)
        if recipe.layout == "channels-last":
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        kind, options = OPTIMIZERS[recipe.optimizer]
        parameters = [p for p in model.parameters() if p.requires_grad]
        half = len(parameters) // 2
        groups = (
            [{"params": parameters}]
            if kind == "LBFGS"
            else [{"params": parameters[:half]}, {"params": parameters[half:], "lr": options["lr"] / 2}]
        )
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(groups, **options)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.9)
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    def state(self) -> dict[str, Any]:
        """The training state, as it is handed to ``save`` and ``resume``."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "average": self.average,
        }

    def step(self, number: int) -> None:
        """Take the training step with this number; what it does depends on the number and the recipe alone."""
        draw = torch.Generator().manual_seed(1000 * self.recipe.seed + number)
        images = torch.randn(_SAMPLES, _CHANNELS, _EDGE, _EDGE, generator=draw)
        labels = torch.randint(_CLASSES, (_SAMPLES,), generator=draw)
        if self.recipe.dtype != "fp32" and self.recipe.module != "embedded":
            images = images.to(torch.bfloat16)

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(images).float(), labels)
            loss.backward()
            return loss

        habit = HABITS[self.recipe.habit]
        habit.before(self, number)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        else:
            closure()
            habit.at_gradients(self, closure)
            self.optimizer.step()
        if self.recipe.dtype == "bf16-fp32-state" and number == 1:
            self._widen()
        self.schedule.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter.float(), 0.1)

    def _widen(self) -> None:
        """Keep the moments in fp32 beside bf16 parameters, as mixed-precision trainers do."""
        for values in self.optimizer.state.values():
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and key in _FREE_DTYPE:
                    values[key] = value.float()


#: State that torch's optimizers take in fp32 beside bf16 parameters, in the implementation without foreach.
_FREE_DTYPE = frozenset({"momentum_buffer"})


class Habit:
    """What a loop does to its own tensors, beside the optimizer's step. ``told``: it may change what a save that is
    still being copied holds, so such a save may fail, if it says so."""

    told = False

    def before(self, training: Training, number: int) -> None:
        """Called before the forward pass."""

    def at_gradients(self, training: Training, closure: Callable[[], torch.Tensor]) -> None:
        """Called when the gradients are there."""


class _Clipping(Habit):
    """Bounds the weights in place before the forward pass, as WGAN does."""

    told = True

    def before(self, training: Training, number: int) -> None:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.clamp_(-0.08, 0.08)


class _Decaying(Habit):
    """Shrinks the weights behind autograd's back now and then."""

    told = True

    def before(self, training: Training, number: int) -> None:
        if number % 3 == 0:
            for parameter in training.model.parameters():
                parameter.data.mul_(0.99)


class _Perturbing(Habit):
    """Looks for the sharpest point near by, takes the gradients there and goes back, as SAM does."""

    told = True

    def at_gradients(self, training: Training, closure: Callable[[], torch.Tensor]) -> None:
        kept = [parameter.detach().clone() for parameter in training.model.parameters()]
        with torch.no_grad():
            for parameter in training.model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=0.05)
        closure()
        with torch.no_grad():
            for parameter, value in zip(training.model.parameters(), kept, strict=True):
                parameter.copy_(value)


class _Forgetting(Habit):
    """Empties the optimizer's moments now and then."""

    told = True

    def before(self, training: Training, number: int) -> None:
        if number % 3 == 2:
            for values in training.optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        value.zero_()


class _Averaging(Habit):
    """Puts the averaged weights into the model now and then."""

    told = True

    def before(self, training: Training, number: int) -> None:
        if number % 4 == 0:
            own = dict(training.model.named_parameters())
            with torch.no_grad():
                torch._foreach_copy_(
                    list(own.values()), [training.average[name].to(p.dtype) for name, p in own.items()]
                )


class _Bounded(Habit):
    """Clips the gradients: no tensor of the state changes."""

    def at_gradients(self, training: Training, closure: Callable[[], torch.Tensor]) -> None:
        nn.utils.clip_grad_norm_(training.model.parameters(), 0.5)


HABITS: Mapping[str, Habit] = {
    "plain": Habit(),
    "clip-gradients": _Bounded(),
    "clip-weights": _Clipping(),
    "decay-data": _Decaying(),
    "perturb": _Perturbing(),
    "forget": _Forgetting(),
    "average-in": _Averaging(),
}


@dataclass(frozen=True)
class Recipe:
    """Says what is trained, and how."""

    seed: int
    module: str = "flat"
    optimizer: str = "adamw"
    dtype: str = "fp32"
    layout: str = "contiguous"
    habit: str = "plain"

    def __str__(self) -> str:
        return f"{self.seed}-{self.module}-{self.optimizer}-{self.dtype}-{self.layout}-{self.habit}"

    def is_sound(self) -> bool:
        """Whether torch can train this at all."""
        return not (
            (self.dtype != "fp32" and self.optimizer in _FP32_ONLY)
            or (self.layout == "channels-last" and (self.module != "convolutions" or self.optimizer == "lbfgs"))
            or (self.dtype == "bf16-fp32-state" and self.optimizer != "momentum")
        )


def recipes(count: int, seed: int) -> Iterator[Recipe]:
    """Yield so many recipes that are drawn at random; ``seed`` decides which."""
    rng = random.Random(seed)
    choices = (list(MODULES), list(OPTIMIZERS), list(DTYPES), list(FORMATS), list(HABITS))
    drawn = (Recipe(rng.randrange(1 << 20), *(rng.choice(options) for options in choices)) for _ in itertools.count())
    return itertools.islice((recipe for recipe in drawn if recipe.is_sound()), count)


def fingerprint(value: Any, path: str = "") -> dict[str, Any]:
    """Every value in a training state by its path: a tensor as dtype, shape, strides and bytes, the rest as itself."""
    if isinstance(value, (nn.Module, torch.optim.Optimizer)) or hasattr(value, "state_dict"):
        return fingerprint(value.state_dict(), path)
    if isinstance(value, Mapping):
        found = [fingerprint(item, f"{path}.{key}") for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        found = [fingerprint(item, f"{path}.{number}") for number, item in enumerate(value)]
    elif isinstance(value, torch.Tensor):
        tensor = value.detach()
        strides = tensor.stride() if tensor.numel() > 1 and tensor.ndim > 1 else ()
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return {path: (str(tensor.dtype), tuple(tensor.shape), strides, data)}
    else:
        return {path: value if not callable(value) else None}
    return {key: item for part in found for key, item in part.items()}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The paths whose values differ, with what differs but for the bytes."""
    told = []
    for key in sorted({*found, *expected}):
        a, b = found.get(key, "missing"), expected.get(key, "missing")
        if a != b and not (a != a and b != b):
            shown = (a[:3], b[:3]) if isinstance(a, tuple) and isinstance(b, tuple) else (a, b)
            told.append(f"{key}: {shown[0]!s:.80} for {shown[1]!s:.80}")
    return told
