"""Train with Accelerate and checkpoints in the background; kill it at any time and run it again.

python examples/accelerate_loop.py --out runs/accelerate
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import asyncckpt
from asyncckpt.integrations.accelerate import AsyncState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    x = torch.randn(256, 16)
    data = DataLoader(TensorDataset(x, x.sum(-1)), 32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3), data)

    with AsyncState(accelerator, given.out, keep=asyncckpt.KeepLast(2)) as state:
        step = state.load_state()  # the newest checkpoint that verifies; 0 where there is none
        for epoch in range(step // len(loader), given.epochs):
            loader.set_epoch(epoch)
            for inputs, targets in state.skip_first_batches(loader, step - epoch * len(loader)):
                loss = nn.functional.mse_loss(model(inputs).squeeze(-1), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % 5 == 0:
                    state.save_state(step, metrics={"loss": loss.item()})
    print(f"step {step}, checkpoints {[entry.step for entry in asyncckpt.Run(given.out).ls()]}")


if __name__ == "__main__":
    main()
