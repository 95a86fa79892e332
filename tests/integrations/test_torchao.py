"""Models and optimizers that torchao has quantised come back as they were, and go on as they would have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer, Run, StateMismatch, UnsupportedValue

quantization = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
    "int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(version=2),
    "float8": quantization.Float8WeightOnlyConfig,
}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(torch.bfloat16)


def quantised(seed: int, config: str) -> nn.Module:
    found = model(seed)
    quantization.quantize_(found, CONFIGS[config]())
    return found


def inside(value: Any) -> list[torch.Tensor]:
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def save(path: Path, state: dict[str, Any]) -> Run:
    with Checkpointer(path) as run:
        run.save(1, state).result()
    return Run(path)


@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_weights_come_back_to_the_bit(config: str, tmp_path: Path) -> None:
    first, second = quantised(1, config), quantised(2, config)
    run = save(tmp_path, {"model": first})
    assert run.restore({"model": second}).whole
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert type(one) is type(two)
        pairs = zip(inside(one), inside(two), strict=True) if hasattr(one, "__tensor_flatten__") else [(one, two)]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    image = torch.randn(3, 64).to(torch.bfloat16)
    assert torch.equal(first(image), second(image))


def test_another_quantisation_is_a_mismatch_with_a_way_out(tmp_path: Path) -> None:
    run = save(tmp_path, {"model": quantised(1, "int8")})
    with pytest.raises(StateMismatch, match=r"model\.0\.weight: saved as a Int8Tensor, live a Float8Tensor"):
        run.restore({"model": quantised(2, "float8")})
    with pytest.raises(StateMismatch, match="live is a plain tensor"):
        run.restore({"model": model(2)})
    again = model(2)
    quantization.quantize_(again, CONFIGS["int8"]())  # the way out
    assert run.restore({"model": again}).whole


def test_a_model_is_restored_first_and_quantised_then(tmp_path: Path) -> None:
    first = model(1)
    run = save(tmp_path, {"model": first})
    with pytest.raises(StateMismatch, match="quantise the model after restoring it"):
        run.restore({"model": quantised(2, "int8")})
    second = model(2)
    run.restore({"model": second})
    expected = copy.deepcopy(first)
    for one in (second, expected):
        quantization.quantize_(one, CONFIGS["int8"]())
    assert torch.equal(second[0].weight.qdata, expected[0].weight.qdata)


@pytest.mark.parametrize("watched", [False, True])
def test_an_8_bit_optimizer_that_is_wrapped_goes_on(watched: bool, tmp_path: Path) -> None:
    from torchao.optim import AdamW8bit

    def made(seed: int) -> tuple[nn.Module, Any]:
        found = model(seed)
        return found, AdamW8bit(found.parameters())

    def train(found: nn.Module, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            found(torch.randn(4, 64).to(torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    first, optimizer = made(1)
    train(first, optimizer, range(3))
    with Checkpointer(tmp_path) as run:
        if watched:
            run.watch(optimizer)
        run.save(3, {"model": first, "optimizer": optimizer})
        train(first, optimizer, range(3, 6))
    second, other = made(2)
    with Checkpointer(tmp_path) as run:
        assert run.resume({"model": second, "optimizer": other}) is not None
    train(second, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_another_block_size_is_a_mismatch(tmp_path: Path) -> None:
    from torchao.optim import AdamW8bit

    def made(block_size: int) -> dict[str, Any]:
        found = model(1)
        optimizer = AdamW8bit(found.parameters(), block_size=block_size)
        found(torch.randn(4, 64).to(torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        return {"model": found, "optimizer": optimizer}

    run = save(tmp_path, made(256))
    with pytest.raises(StateMismatch, match=r"optimizer\.0\.weight: .*scale inside was saved as"):
        run.restore(made(128))
    assert run.restore(made(256)).whole


def test_quantised_state_of_a_sharded_module_is_refused_by_name(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torchao.optim.subclass_8bit import OptimState8bit

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = DTensor.from_local(OptimState8bit.zeros((64, 64)), mesh, [Replicate()], run_check=False)
        with (
            Checkpointer(tmp_path) as run,
            pytest.raises(UnsupportedValue, match="a DTensor whose local part is a Opt"),
        ):
            run.save(1, {"held": {"moment": state}})
    finally:
        torch.distributed.destroy_process_group()
