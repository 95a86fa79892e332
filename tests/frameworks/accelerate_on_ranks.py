"""Trains a tiny model with Accelerate on all ranks of a job, unbroken and stopped and resumed; see ``test_accelerate``.

torchrun --nproc-per-node 2 accelerate_on_ranks.py FOLDER ddp|fsdp2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from asyncckpt.integrations.accelerate import AsyncState

sys.path.insert(0, str(Path(__file__).parents[1]))

from frameworks.fsdp_on_cpu import local, use_fsdp_on_cpu


class Training:
    """Has a model with dropout, its optimizer and its data, always the same."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        loaders = DataLoaderConfiguration(use_seedable_sampler=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, state_dict_type="SHARDED_STATE_DICT"
        )
        fsdp = {"fsdp_plugin": plugin} if kind == "fsdp2" else {}
        self.accelerator = Accelerator(cpu=True, dataloader_config=loaders, **fsdp)
        assert (self.accelerator.distributed_type == DistributedType.FSDP) == (kind == "fsdp2")
        net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
        x = torch.randn(256, 16)
        data = DataLoader(TensorDataset(x, x.sum(-1)), 16, shuffle=True)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(net, optimizer, data)

    def run(self, state: AsyncState | None, stop: int | None = None) -> dict[str, Any]:
        """Train three epochs, or up to a step; return the weights."""
        torch.manual_seed(7 + self.accelerator.process_index)
        step = state.load_state() if state is not None else 0
        for epoch in range(step // len(self.loader), 3):
            self.loader.set_epoch(epoch)
            skipped = step - epoch * len(self.loader)
            for inputs, targets in self.loader if state is None else state.skip_first_batches(self.loader, skipped):
                loss = nn.functional.mse_loss(self.model(inputs).squeeze(-1), targets)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                step += 1
                if state is not None and step % 5 == 0:
                    state.save_state(step)
                if step == stop:
                    break
            if step == stop:
                break
        return self.weights()

    def weights(self) -> dict[str, Any]:
        return local({name: value.detach().clone() for name, value in self.model.state_dict().items()})


def main(folder: Path, kind: str) -> None:
    """Train, and have rank 0 write whether each rank has found the same bits: at the end of a training that was
    stopped, and in what plain Accelerate loads from an export."""
    use_fsdp_on_cpu()
    expected = Training(kind).run(None)
    for stop in (13, None):
        training = Training(kind)
        with AsyncState(training.accelerator, folder / "ours") as state:
            weights = training.run(state, stop)
    exporting = Training(kind)
    with AsyncState(exporting.accelerator, folder / "ours") as state:
        state.export(folder / "exported")
    plain = Training(kind)
    plain.accelerator.load_state(str(folder / "exported"))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [same(weights, expected), same(plain.weights(), exporting.weights())])
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    # gloo's thread lets go of the gathered tensors while this one waits: at exit that would abort the process
    dist.barrier()
    dist.destroy_process_group()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
