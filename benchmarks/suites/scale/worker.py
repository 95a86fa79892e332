"""``torchrun --nproc-per-node N -m benchmarks.suites.scale.worker DIRECTORY EVENTS`` saves a tiny model on N ranks.

Rank 0 writes one JSON object to EVENTS: the seconds of the slowest rank for each phase.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from asyncckpt import Checkpointer

_SAVES = 4


def main(directory: str, events: str) -> None:
    """Prepare, save a few times, and restore."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    phases: dict[str, float] = {}
    with Checkpointer(directory) as checkpointer:
        checkpointer.watch(optimizer)
        began = _together()
        checkpointer.prepare(state)
        phases["prepare"] = time.perf_counter() - began
        for step in range(1, _SAVES + 1):
            began = _together()
            pending = checkpointer.save(step, state)
            phases[f"returned {step}"] = time.perf_counter() - began
            optimizer.step()
            pending.result()
            phases[f"durable {step}"] = time.perf_counter() - began
        began = _together()
        checkpointer.restore(state, step=_SAVES)
        phases["restore"] = time.perf_counter() - began
    slowest = torch.tensor(list(phases.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        body = {"ranks": dist.get_world_size(), **dict(zip(phases, slowest.tolist(), strict=True))}
        Path(events).write_text(json.dumps(body))
    dist.barrier()
    dist.destroy_process_group()


def _together() -> float:
    dist.barrier()
    return time.perf_counter()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
