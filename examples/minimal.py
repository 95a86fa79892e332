"""This training loop saves while it trains, and takes up where it was stopped, in ten lines of asyncckpt.

python examples/minimal.py --out runs/minimal            # press Ctrl-C, or kill -9 it, and start it again
"""

import argparse

import torch

import asyncckpt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="runs/minimal")
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters())

ckpt = asyncckpt.Checkpointer(
    args.out, every=50, keep=asyncckpt.KeepLast(3), run=asyncckpt.RunOptions(create_parents=True)
)
state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}
ckpt.watch(optimizer)  # saves may now overlap forward and backward
start = ckpt.resume(state)  # the newest checkpoint that verifies; 0 where there is none
print(f"starting after step {start}")
with ckpt:  # waits for the last save on the way out, and raises what failed in the background
    for step in range(start + 1, args.steps + 1):
        inputs = torch.randn(64, 32)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ckpt.step(step, state, metrics={"loss": loss.item()})  # microseconds, unless a save is due
print("checkpoints:", ", ".join(f"step {entry.step} (loss {entry.metrics['loss']:.3f})" for entry in ckpt.ls()))
