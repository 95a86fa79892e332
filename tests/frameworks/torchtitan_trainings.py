"""Trainings with torchtitan's containers and FSDP2 for ranks of a crew, through its own manager or ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from frameworks.killing import count_calls
from support.harness import Me
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a training is to do. ``config``: fields of the manager's. ``kill``: the rank that kills itself, and at which
    of its calls to the disk."""

    folder: str
    ours: bool = True
    load: bool = True
    step: int = -1
    last: int = 6
    end: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    kill: tuple[int, int] | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """``state``: that of the model and the optimizer, whole, on rank 0. ``calls``: to the disk."""

    loaded: bool
    first: int
    model: Any
    optimizer: Any
    schedule: Any
    calls: int


class Trainer:
    """What torchtitan's trainer is to a manager: a step, and how many tokens it has seen."""

    def __init__(self) -> None:
        self.step = 0
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seen = state["step"], state["ntokens_seen"]


@torch.no_grad()  # with gradients, torch 2.13 seems to hold the interpreter while it waits for other ranks
def whole(state: dict[str, Any]) -> Any:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in state.items()
    }


def train(me: Me, asked: Asked) -> Ended:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
    from torchtitan.components.optimizer.optimizer import ParamGroupConfig

    from asyncckpt.integrations.torchtitan import AsyncckptManager

    if not dist.is_initialized():  # a crew of one has no job
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(asked.seed)
    model = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5)).to(asked.dtype)
    mesh = init_device_mesh("cpu", (me.size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = [
        ParamGroupConfig(pattern="bias", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.0}),
        ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.1}),
    ]
    optimizers = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(model_parts=[model])
    schedules = LRSchedulersContainer.Config(warmup_steps=3).build(optimizers=optimizers, training_steps=20)
    trainer = Trainer()
    kind = AsyncckptManager if asked.ours else CheckpointManager
    manager = kind.Config(**{"enable": True, "folder": "saved", "interval": 2, **asked.config}).build(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedules,
        states={"train_state": trainer},
        sd_adapter=None,
        base_folder=asked.folder,
    )
    made = count_calls(asked.kill[1] if asked.kill is not None and asked.kill[0] == me.rank else None)
    loaded = manager.load(asked.step) if asked.load else False
    first = trainer.step
    while trainer.step < asked.last:
        generator = torch.Generator().manual_seed(100 * trainer.step)
        trainer.step += 1
        trainer.seen += 8
        optimizers.zero_grad()
        model(torch.randn(8, 7, generator=generator).to(asked.dtype)).square().mean().backward()
        manager.maybe_wait_for_staging()
        optimizers.step()
        schedules.step()
        manager.save(trainer.step, last_step=asked.end and trainer.step == asked.last)
    if asked.last == 0:
        manager.save(0, last_step=True)
    optimizer = optimizers.state_dict() if optimizers.optimizers[0].state else {}
    found = whole(model.state_dict()), whole(optimizer)
    manager.maybe_wait_for_saving()
    manager.close()
    dist.barrier()
    return Ended(loaded, first, found[0], found[1], schedules.state_dict(), made[0])
