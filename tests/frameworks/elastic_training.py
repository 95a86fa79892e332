"""A training that an elastic agent starts, with any number of ranks. All have the same data, so with one rank or two it
ends with the same bits. Is given the run's directory, and how many seconds a step takes. While there is a file
``most.txt``, steps after the one that it names wait."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import asyncckpt

STEPS = 40


def _most(out: Path) -> int:
    try:
        return int((out / "most.txt").read_text() or 0)
    except FileNotFoundError:
        return STEPS + 1


def main() -> None:
    out, seconds = Path(sys.argv[1]), float(sys.argv[2])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    state = {"model": model, "optimizer": optimizer}
    preemption = asyncckpt.Preemption()
    ranks = asyncckpt.RankOptions(timeout_seconds=20)
    with asyncckpt.Checkpointer(out / "run", every=2, preemption=preemption, ranks=ranks) as ckpt:
        ckpt.watch(optimizer)
        first = ckpt.resume(state)
        if dist.get_rank() == 0:
            with (out / "starts.txt").open("a") as log:
                log.write(f"{dist.get_world_size()} {first}\n")
        for step in range(first + 1, STEPS + 1):
            data = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            (out / f"at-{os.getpid()}.txt").write_text(str(step))
            time.sleep(seconds)
            ckpt.step(step, state)
            while step >= _most(out) and not ckpt.preempting:
                time.sleep(0.05)
    if dist.get_rank() == 0:
        found = asyncckpt.Run(out / "run").load_tensors(STEPS)
        digest = hashlib.sha256()
        for name in sorted(found):
            digest.update(name.encode() + found[name].numpy().tobytes())
        (out / "end.txt").write_text(digest.hexdigest())
    dist.barrier()
    dist.destroy_process_group()


main()
