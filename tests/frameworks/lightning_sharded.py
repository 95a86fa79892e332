"""Trainings in Lightning that shard a tiny model over the ranks of a crew: see ``test_lightning_sharded``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
import torch.distributed as dist
from frameworks.killing import count_calls
from frameworks.lightning_trainings import ShuffledLoader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from support.harness import Me
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asyncckpt.integrations.lightning import (
    AsyncckptCallback,
    AsyncckptDDPStrategy,
    AsyncckptFSDPStrategy,
    AsyncckptIO,
    AsyncckptModelParallelStrategy,
    RandomState,
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a training is to do. ``kind``: ``fsdp2``, ``tp``, ``fsdp1`` or ``ddp``. ``checkpoints``: options of
    ``ModelCheckpoint``. ``kill``: the rank that kills itself, and at which of its calls to the disk. ``hook``: what the
    module does before a save."""

    folder: str
    kind: str = "fsdp2"
    ours: bool = True
    epochs: int = 4
    ckpt_path: str | None = None
    seed: int = 0
    groups: int = 2
    dropout: float = 0.1
    own_order: bool = False
    extra: bool = False
    strict: bool = True
    kill: tuple[int, int] | None = None
    every: int = 0
    checkpoints: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    hook: Callable[[dict[str, Any]], Any] | None = None


@dataclass(frozen=True)
class Ended:
    """``state``: what this rank has of the weights, the buffers and the optimizer's state, and its random numbers.
    ``calls``: to the disk."""

    state: dict[str, Any]
    step: int
    calls: int


class PlainFSDP(FSDPStrategy):
    """Lightning refuses its own class on ranks without GPUs, and no class that inherits it."""


class Loader(ShuffledLoader):
    """Gives each rank a part of each batch, in an order that all ranks have alike, unless each is to have its own; of
    tensor parallelism, all of it."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        if asked.own_order:
            self.generator.manual_seed(dist.get_rank())
        self.parts = 1 if asked.kind == "tp" else dist.get_world_size()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            yield batch.tensor_split(self.parts)[dist.get_rank() % self.parts]


class Model(lightning.LightningModule):
    """Has sizes that no number of ranks divides, a frozen weight, dropout and a buffer."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked
        torch.manual_seed(asked.seed)
        inner = 34 if asked.kind == "tp" else 33
        dropout = nn.Dropout(asked.dropout)
        self.net = nn.Sequential(nn.Linear(8, inner), nn.GELU(), dropout, nn.Linear(inner, 7), nn.LayerNorm(7))
        self.net[4].bias.requires_grad = False
        self.register_buffer("seen", torch.zeros(()))
        self.extra = nn.Linear(2, 2) if asked.extra else None
        self.strict_loading = asked.strict

    def configure_model(self) -> None:
        if self.device_mesh is None:  # it is no training that shards
            return
        if self.asked.kind == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[3], self.net):
                fully_shard(part, mesh=mesh)
        if self.asked.kind == "tp":
            plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.seen += 1
        loss: torch.Tensor = (self.net(batch) - batch[:, :7]).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("validated", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        first, rest = list(self.net[0].parameters()), list(self.net[1:].parameters())
        groups = [{"params": rest, "weight_decay": 0.1}, {"params": first, "lr": 2e-2}]
        optimizer = torch.optim.AdamW(groups[: self.asked.groups], lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.asked.hook is not None:
            self.asked.hook(checkpoint)


def strategy(asked: Asked, size: int) -> Any:
    """Return a strategy, ours or plain Lightning's, over all ranks."""
    if asked.kind == "fsdp1":
        kind = AsyncckptFSDPStrategy if asked.ours else PlainFSDP
        return kind(state_dict_type="sharded", auto_wrap_policy={nn.Linear})
    if asked.kind == "ddp":
        return AsyncckptDDPStrategy() if asked.ours else DDPStrategy()
    kind = AsyncckptModelParallelStrategy if asked.ours else ModelParallelStrategy
    return kind(*((1, size) if asked.kind == "tp" else (size, 1)))


def trainer(me: Me, asked: Asked, **options: Any) -> lightning.Trainer:
    """Return a trainer on this rank, as it were started by torchrun."""
    warnings.simplefilter("ignore")
    ours = {"RANK": me.rank, "LOCAL_RANK": me.rank, "WORLD_SIZE": me.size, "LOCAL_WORLD_SIZE": me.size}
    os.environ |= {name: str(value) for name, value in (ours | {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": 1}).items()}
    if not dist.is_initialized():  # a crew of one has no job
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not me.kept.get("fsdp1"):
        me.kept["fsdp1"] = use_fsdp1_on_cpu()
    chosen = {"every_n_train_steps": 3, "save_last": True, "dirpath": asked.folder} | asked.checkpoints
    saving: list[Any] = [AsyncckptCallback(f"{asked.folder}/run", every=asked.every)] if asked.every else []
    return lightning.Trainer(
        max_epochs=asked.epochs,
        strategy=strategy(asked, me.size),
        callbacks=[*(saving or [ModelCheckpoint(**chosen)]), RandomState()],
        plugins=[AsyncckptIO(**asked.options)] if asked.options else [],
        default_root_dir=asked.folder,
        accelerator="cpu",
        devices=me.size,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def train(me: Me, asked: Asked) -> Ended:
    """Train, and return what this rank has in the end."""
    one, model = trainer(me, asked), Model(asked)
    torch.manual_seed(7 + me.rank)
    made = count_calls(asked.kill[1] if asked.kill is not None and asked.kill[0] == me.rank else None)
    one.fit(model, Loader(asked), ckpt_path=asked.ckpt_path)
    return Ended(state(one), one.global_step, made[0])


def again(me: Me, asked: Asked, name: str) -> None:
    """Resume where nothing is left to train, and save that under another name."""
    one = trainer(me, asked)
    one.fit(Model(asked), Loader(asked), ckpt_path=asked.ckpt_path)
    one.save_checkpoint(f"{asked.folder}/{name}")
    one.strategy.teardown()


def validated(me: Me, asked: Asked) -> tuple[float, dict[str, Any]]:
    """Validate, and return what was found and what this rank has of the weights."""
    one, model = trainer(me, asked), Model(asked)
    found = one.validate(model, Loader(asked), ckpt_path=asked.ckpt_path, verbose=False)
    return found[0]["validated"], _local(dict(model.named_parameters()))


def best(me: Me, asked: Asked) -> tuple[str, dict[str, Any]]:
    """Train, then validate what ``ModelCheckpoint`` has found best; return its name and what this rank has of it."""
    one = trainer(me, asked)
    one.fit(Model(asked), Loader(asked))
    model = Model(asked)
    one.validate(model, Loader(asked), ckpt_path="best", verbose=False)
    found = _local(dict(model.named_parameters()))
    one.save_checkpoint(f"{asked.folder}/after.ckpt", weights_only=True)
    one.strategy.teardown()
    return os.path.basename(one.checkpoint_callback.best_model_path), found


def state(one: Any) -> dict[str, Any]:
    model, optimizer = one.strategy.model, one.optimizers[0]
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for number, parameter in enumerate(each for group in optimizer.param_groups for each in group["params"]):
        found |= {f"{number}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    found["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    found["random"] = torch.get_rng_state()
    return _local(found)


def _local(found: dict[str, Any]) -> dict[str, Any]:
    """Return copies of what this rank has of each tensor."""
    parts = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in found.items()}
    return {name: torch.as_tensor(value).detach().clone() for name, value in parts.items()}


def use_fsdp1_on_cpu() -> bool:
    """Have FSDP 1 use the CPU where it is told no device, as Lightning tells it on ranks without GPUs."""
    original = FullyShardedDataParallel.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options | {"device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = made
    return True
