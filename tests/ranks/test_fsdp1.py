"""FSDP as it was first, as far as torch still has it: models and optimizers are stored and restored like FSDP2's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT
from torch import nn

import asyncckpt

STEPS = 3


class Net(nn.Module):
    """Has sizes that no number of ranks divides, a tied weight, a parameter that is not trained, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(30, 517), nn.ReLU(), nn.Linear(517, 129, bias=False), nn.LayerNorm(129))
        self.scale = nn.Parameter(torch.rand(1))
        self.head = nn.Linear(129, 7)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(given) * self.scale)
        return found


def _wrapped(
    me: Me, *, meshed: bool = False, original: bool = True, seed: int = 0, strategy: str = "FULL_SHARD"
) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    warnings.simplefilter("ignore")  # it is deprecated, which is why this is here
    options: dict[str, Any] = {"use_orig_params": original, "device_id": torch.device("cpu")}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    if strategy == "HYBRID_SHARD":
        options["device_mesh"] = init_device_mesh("cpu", (2, me.size // 2), mesh_dim_names=("replicate", "shard"))
    elif meshed:
        options["device_mesh"] = init_device_mesh("cpu", (me.size,))
    net = Net(seed)
    net.body = FullyShardedDataParallel(net.body, **options)
    return FullyShardedDataParallel(net, **options)


def _optimizer(model: nn.Module, *, foreach: bool = False) -> torch.optim.Optimizer:
    decay = [one for name, one in model.named_parameters() if "body" in name]
    rest = [one for name, one in model.named_parameters() if "body" not in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 2e-3}]
    return torch.optim.AdamW(groups, lr=1e-2, amsgrad=True, foreach=foreach)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Every rank has the same data, so that the number of ranks makes no difference but for the order of sums."""
    for step in range(first, last):
        given = torch.randn(8, 30, generator=torch.Generator().manual_seed(step))
        model(given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _saved(me: Me, path: str, options: dict[str, Any]) -> Any:
    """Train and save; return what FSDP itself says that the state is."""
    model = _wrapped(me, **options)
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, STEPS)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.watch(optimizer)
        pending = run.save(1, {"model": model, "optimizer": optimizer})
        pending.result(60)
    return _full(model, optimizer)


def _full(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return the whole state, as FSDP's own code gathers it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    found = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return copy.deepcopy(found) if torch.distributed.get_rank() == 0 else None


def _resumed(me: Me, path: str, options: dict[str, Any], fresh: bool, last: int) -> Any:
    """Restore into another model; return the whole state then, and after more training."""
    model = _wrapped(me, seed=9, **options)
    optimizer = _optimizer(model)
    if not fresh:
        _train(model, optimizer, 7, 8)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.restore({"model": model, "optimizer": optimizer}, 1)
        there = _full(model, optimizer)
        run.save(me.size, {"model": model, "optimizer": optimizer}).result(60)
    _train(model, optimizer, STEPS, last)
    return there, _full(model, optimizer)


def _as_fsdp_does(me: Me, given: Any, options: dict[str, Any], last: int) -> Any:
    """Load a whole state through FSDP's own code, and train on. What is given lies in memory that all ranks share."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    model = _wrapped(me, seed=9, **options)
    optimizer = _optimizer(model)
    given, whole = copy.deepcopy(given), StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=given[0], optim_state_dict=given[1], options=whole)
    _train(model, optimizer, STEPS, last)
    return _full(model, optimizer)


def _assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            _assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            _assert_same(one, other, f"{where}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
        assert found.dtype == expected.dtype
    else:
        assert found == expected, where


WAYS = {
    "original": {"original": True},
    "flat": {"original": False},
    "meshed": {"original": True, "meshed": True},
    "flat-meshed": {"original": False, "meshed": True},
    "not-sharded": {"original": True, "strategy": "NO_SHARD"},
    "flat-not-sharded": {"original": False, "strategy": "NO_SHARD"},
}


def _plainly(path: str) -> Any:
    """Restore into a plain model and optimizer of one process."""
    model = Net(9)
    optimizer = _optimizer(model)
    asyncckpt.Run(path).restore({"model": model, "optimizer": optimizer}, 1)
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_model_and_optimizer_go_on_with_any_number_of_ranks_as_fsdp_itself_does(
    way: str, crews: Crews, tmp_path: Path
) -> None:
    path, options = str(tmp_path / "run"), WAYS[way]
    before = crews(3).values(_saved, path, options)[0]
    for size, fresh in ((2, True), (3, False)):
        there, ended = crews(size).values(_resumed, path, options, fresh, STEPS + 2)[0]
        _assert_same(there, before)
        _assert_same(ended, crews(size).values(_as_fsdp_does, before, options, STEPS + 2)[0])
        _assert_same(asyncckpt.Run(path).load_tensors(size), asyncckpt.Run(path).load_tensors(1))


def test_whole_model_and_optimizer_of_one_process_go_on_and_back(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    model = Net()
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, STEPS)
    with asyncckpt.Checkpointer(path) as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result(60)
    for size, original in ((2, False), (3, True)):
        crews(size).values(_resumed, path, {"original": original}, True, STEPS)
        _assert_same(asyncckpt.Run(path).load_tensors(size), asyncckpt.Run(path).load_tensors(1))
    crews(2).values(_saved, str(tmp_path / "other"), {"original": False})
    found = _plainly(str(tmp_path / "other"))
    assert len(found[1]["state"]) == len(list(model.parameters()))
    stored = asyncckpt.Run(tmp_path / "other").load_tensors(1, ["model"])
    _assert_same({f"model.{name}": value for name, value in found[0].items()}, stored)


def test_what_cannot_be_stored_so_is_refused(crews: Crews, tmp_path: Path) -> None:
    outcomes = crews(2).run(_compressed, str(tmp_path / "run"))
    assert all("FSDP 1" in one.message and one.failed_with("UnsupportedValue") for one in outcomes), outcomes
    outcomes = crews(2).run(_factored, str(tmp_path / "run"))
    assert all("element by element" in one.message and one.failed_with("UnsupportedValue") for one in outcomes)


def _compressed(me: Me, path: str) -> None:
    model = _wrapped(me)
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, 1)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT, files=asyncckpt.Safetensors(per_rank=True)) as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result(60)


def _factored(me: Me, path: str) -> None:
    model = _wrapped(me)
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, 1)
    for values in optimizer.state.values():
        values["exp_avg"] = torch.zeros(2, 3)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, {"model": model, "optimizer": optimizer}).result(60)


def test_hybrid_shards_are_held_twice_and_written_once(crews: Crews, tmp_path: Path) -> None:
    path, options = str(tmp_path / "run"), {"original": True, "strategy": "HYBRID_SHARD"}
    before = crews(4).values(_saved, path, options)[0]
    there, _ = crews(2).values(_resumed, path, {"original": False}, True, STEPS + 1)[0]
    _assert_same(there, before)
