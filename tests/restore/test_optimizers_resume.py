"""Training that was resumed goes on bit for bit as training that was never interrupted, whatever the optimizer is."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from asyncckpt import AsyncCkptError, Checkpointer

#: What a variant gives to the optimizer, where its class takes it.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Arguments of classes that cannot be made without.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "torch.SGD": {"lr": 0.01, "momentum": 0.9},
    "torch.LBFGS": {"lr": 0.1, "max_iter": 3},
}
#: Keep their state in tensor subclasses, of parameters of 4096 elements and more.
QUANTISED = ["torchao.AdamW8bit", "torchao.AdamW4bit", "torchao.AdamWFp8"]
QUICK = ["torch.AdamW", "torch.NAdam", "torch.ASGD", "torch.SGD", "torch.Adafactor", "torch.LBFGS", "torch.Rprop"]


class WideState(torch.optim.Optimizer):
    """Keeps fp32 moments and masters, and an integer order, beside parameters of any dtype."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["master"] = parameter.float()
                state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["order"] = torch.arange(parameter.numel()).flip(0)
                state["calls"] = 0
            state["calls"] += 1
            state["moment"].lerp_(parameter.grad.float(), 0.1)
            state["order"] = state["order"].roll(state["calls"])
            noise = (state["order"].view(parameter.shape) % 7).float() * 1e-3
            state["master"].sub_(state["moment"] + noise, alpha=self.param_groups[0]["lr"])
            parameter.copy_(state["master"])


def classes() -> list[str]:
    """List every optimizer of torch and of the collections that are installed, as ``package.Class``."""
    found = ["own.WideState"]
    for package, module in (
        ("torch", "torch.optim"),
        ("pytorch_optimizer", "pytorch_optimizer"),
        ("schedulefree", "schedulefree"),
        ("muon", "muon"),
        ("torchao", "torchao.optim"),
    ):
        with contextlib.suppress(ImportError):
            there = importlib.import_module(module)
            found += [
                f"{package}.{name}"
                for name, kind in sorted(vars(there).items())
                if isinstance(kind, type)
                and issubclass(kind, torch.optim.Optimizer)
                and kind is not torch.optim.Optimizer
            ]
    return found


def make(name: str, dtype: torch.dtype, variant: str, channels_last: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if channels_last:
        model: nn.Module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3, bias=False))
        model = model.to(memory_format=torch.channels_last)
    else:
        wide = 16 if name.startswith("torchao.") else 1
        model = nn.Sequential(nn.Linear(4 * wide, 8 * wide, bias=False), nn.Linear(8 * wide, 4 * wide, bias=False))
    model = model.to(dtype)
    if name == "own.WideState":
        return model, WideState(model.parameters())
    package, _, kind = name.partition(".")
    module = {"torch": "torch.optim", "torchao": "torchao.optim"}.get(package, package)
    cls = getattr(importlib.import_module(module), kind)
    takes = inspect.signature(cls.__init__).parameters
    given = {k: v for k, v in VARIANTS[variant].items() if k in takes} | ARGUMENTS.get(name, {})
    if "lr" in takes and takes["lr"].default is inspect.Parameter.empty:
        given["lr"] = 0.01
    if variant != "plain" and not given.keys() & VARIANTS[variant].keys():
        pytest.skip(f"{name} has no such variant")
    if "optimizer" in takes and takes["optimizer"].default is inspect.Parameter.empty:
        return model, cls(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), **given)
    if "base_optimizer" in takes:  # sharpness-aware ones, whose step calls the closure between two of its own
        given |= {"base_optimizer": torch.optim.SGD, "lr": 0.01, "momentum": 0.9}
    given |= {key: value for key, value in {"model": model, "num_data": 16}.items() if key in takes}
    if name.startswith("muon.") and "param_groups" in takes:
        first, *rest = model.parameters()
        return model, cls([{"params": [first], "use_muon": True}, {"params": rest, "use_muon": False}])
    wanted = [p for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if [p.name for p in wanted if p.name not in ("self", "params", *given)]:
        pytest.skip(f"{name} needs more than parameters")
    if "uon" in name or name == "pytorch_optimizer.AdaGO":  # these are told which parameters are matrices
        try:
            return model, cls([{"params": list(model.parameters()), "use_muon": True}], **given)
        except Exception:
            return model, cls(list(model.parameters()), **given)
    return model, cls(params=model.parameters(), **given)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    first = next(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn((2, 2, 6, 6) if first.dim() == 4 else (4, first.shape[1])).to(first.dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(x).float().square().mean()
            loss.backward(create_graph=False)
            return loss

        closure()
        takes = inspect.signature(type(optimizer).step).parameters
        optimizer.step(closure) if "closure" in takes else optimizer.step()


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()]


def resumed_by_torch(name: str, saved: tuple[nn.Module, Any], how: tuple[Any, ...]) -> list[bytes] | None:
    """Return the weights after resuming from ``torch.save``, or None where that does not work at all."""
    model, optimizer = make(name, *how)
    try:
        file = io.BytesIO()
        torch.save([saved[0].state_dict(), saved[1].state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=False)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(3, 6))
    except Exception:
        return None
    return bits(model)


@contextlib.contextmanager
def job_for(name: str) -> Iterator[None]:
    """Make a job of this process alone for the optimizers that step in jobs only."""
    if name not in ("muon.Muon", "muon.MuonWithAuxAdam"):
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check(name: str, dtype: str, variant: str, channels_last: bool, path: Path) -> None:
    with job_for(name):
        _check(name, dtype, variant, channels_last, path)


def _check(name: str, dtype: str, variant: str, channels_last: bool, path: Path) -> None:
    how = DTYPES[dtype], variant, channels_last
    try:
        model, optimizer = make(name, *how)
        train(model, optimizer, range(3))
    except pytest.skip.Exception:
        raise
    except Exception as error:
        pytest.skip(f"{name} does not train so: {type(error).__name__}: {error}")
    refused = None
    try:
        with Checkpointer(path / "run") as run:
            run.save(3, {"model": model, "optimizer": optimizer}).result()
    except AsyncCkptError as error:
        refused = error
    reference = resumed_by_torch(name, (model, optimizer), how)
    if refused is None:
        other_model, other = make(name, *how)
        torch.manual_seed(99)
        with torch.no_grad():
            for parameter in other_model.parameters():
                parameter.normal_()
        with Checkpointer(path / "run") as run:
            run.resume({"model": other_model, "optimizer": other})
        train(other_model, other, range(3, 6))
    train(model, optimizer, range(3, 6))
    unbroken = bits(model)
    if refused is not None:
        pytest.skip(f"refused by name: {refused}")
    if bits(other_model) != unbroken:
        if reference != unbroken:
            pytest.skip(f"{name} does not resume bit for bit from torch.save either")
        raise AssertionError(f"{name} resumes bit for bit from torch.save, and not from a checkpoint")


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps, which takes longer than all else
            yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["own.WideState", *QUICK])
def test_a_sample_of_optimizers_goes_on_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    check(name, dtype, "plain", False, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_optimizers_with_quantised_state_go_on_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    check(name, dtype, "plain", False, tmp_path)
    state = trained_state(name, dtype)
    assert any(hasattr(type(value), "__tensor_flatten__") for value in state.values()), "nothing was quantised"


def trained_state(name: str, dtype: str) -> dict[str, Any]:
    model, optimizer = make(name, DTYPES[dtype], "plain", False)
    train(model, optimizer, range(1))
    found: dict[str, Any] = optimizer.state[next(model.parameters())]
    return found


@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_a_channels_last_model_goes_on_bit_for_bit(variant: str, tmp_path: Path) -> None:
    check("torch.AdamW", "fp32", variant, True, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", classes())
def test_every_optimizer_goes_on_bit_for_bit(
    name: str, dtype: str, variant: str, channels_last: bool, tmp_path: Path
) -> None:
    check(name, dtype, variant, channels_last, tmp_path)
