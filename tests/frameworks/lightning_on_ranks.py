"""Trains a tiny sharded model in Lightning on all ranks of a job; see ``test_lightning_sharded``.

torchrun --nproc-per-node 2 lightning_on_ranks.py FOLDER fsdp2|fsdp1
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from frameworks.fsdp_on_cpu import local
from frameworks.lightning_trainings import ShuffledLoader

from asyncckpt.integrations.lightning import AsyncckptFSDPStrategy, AsyncckptModelParallelStrategy, RandomState

EPOCHS = 4


def use_fsdp1_on_cpu() -> None:
    """Have FSDP 1 use the CPU where it is told no device, as Lightning tells it on ranks without GPUs."""
    original = FullyShardedDataParallel.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options | {"device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = made


class PlainFSDP(FSDPStrategy):
    """Lightning refuses its own class on ranks without GPUs, and no class that inherits it."""


class Loader(ShuffledLoader):
    """Gives each rank a part of each batch, in an order that all ranks have alike."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch.chunk(dist.get_world_size())[dist.get_rank()]


class Model(lightning.LightningModule):
    """Has sizes that no number of ranks divides, a frozen weight and a buffer."""

    def __init__(self, kind: str, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 33), nn.GELU(), nn.Dropout(dropout), nn.Linear(33, 7), nn.LayerNorm(7))
        self.net[0].bias.requires_grad = False
        self.register_buffer("seen", torch.zeros(()))

    def configure_model(self) -> None:
        if self.kind == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[3]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.seen += 1
        loss: torch.Tensor = (self.net(batch) - batch[:, :7]).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        decayed, rest = list(self.net[0].parameters()), list(self.net[1:].parameters())
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 2e-2}], lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def strategy(kind: str, ours: bool) -> Any:
    """Return a strategy, of ours or of plain Lightning, that shards over all ranks."""
    warnings.simplefilter("ignore")
    if kind == "fsdp2":
        made = AsyncckptModelParallelStrategy if ours else ModelParallelStrategy
        return made(data_parallel_size=int(dist_size()), tensor_parallel_size=1)
    made = AsyncckptFSDPStrategy if ours else PlainFSDP
    return made(state_dict_type="sharded", auto_wrap_policy={nn.Linear})


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def fit(
    folder: Path,
    kind: str,
    *,
    ours: bool,
    epochs: int = EPOCHS,
    ckpt_path: Any = None,
    seed: int = 0,
    dropout: float = 0.0,
    model: Model | None = None,
    **options: Any,
) -> lightning.Trainer:
    """Train, and return the trainer."""
    model = model or Model(kind, seed, dropout)
    torch.manual_seed(7 + int(dist.get_rank() if dist.is_initialized() else 0))
    callbacks = options.pop("callbacks", None)
    if callbacks is None:
        callbacks = [ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_last=True)]
    if dropout:
        callbacks.append(RandomState())
    trainer = lightning.Trainer(
        max_epochs=epochs,
        strategy=strategy(kind, ours),
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        devices=dist_size(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(model, Loader(), ckpt_path=ckpt_path)
    return trainer


def end(trainer: Any) -> dict[str, Any]:
    """Return what this rank has of the weights, of the buffers, and of the optimizer's state."""
    model, optimizer = trainer.strategy.model, trainer.optimizers[0]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    found = {**parameters, **dict(model.named_buffers())}
    for number, one in enumerate(one for group in optimizer.param_groups for one in group["params"]):
        found |= {f"{number}/{key}": torch.as_tensor(value) for key, value in optimizer.state.get(one, {}).items()}
    found["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return {name: value.clone() for name, value in local(found).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def main(folder: Path, kind: str) -> None:
    use_fsdp1_on_cpu()
    found: dict[str, Any] = {}
    unbroken = end(fit(folder / "plain", kind, ours=False))
    fit(folder / "ours", kind, ours=True, epochs=2)
    resumed = fit(folder / "ours", kind, ours=True, seed=5, ckpt_path="last")
    found["resumed"] = same(end(resumed), unbroken) and resumed.global_step == 20
    tell(folder, found)


def tell(folder: Path, found: Any) -> None:
    """Have rank 0 write what all ranks have found, and end the job."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(gathered))
    # gloo's thread lets go of the gathered tensors while this one waits: at exit that would abort the process
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
